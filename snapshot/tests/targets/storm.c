// Gives up, moves, grows, unmaps and inherits memory as soon as it notices that it was away, and checks all of it.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 4
static int threads;
#define CHUNK (64 << 10)
static int chunks;
static pthread_barrier_t barrier;

// A chunk's content: each word is made of its number; 0 is zeroes.
struct chunk { unsigned char *at; unsigned long number; };

static unsigned long word(unsigned long number, unsigned long i) { return number ? (number << 20 | i) * 0x9e3779b97f4a7c15ul | 1 : 0; }
static void put(struct chunk *c, unsigned long number) {
    c->number = number;
    unsigned long *w = (void *)c->at;
    for (unsigned long i = 0; i < CHUNK / 8; i++) w[i] = word(number, i);
}
static void check(struct chunk *c, const char *when) {
    unsigned long *w = (void *)c->at;
    for (unsigned long i = 0; i < CHUNK / 8; i++)
        if (w[i] != word(c->number, i)) {
            printf("wrong %s: chunk %lu at %p word %lu is %lx\n", when, c->number, c->at, i, w[i]);
            fflush(stdout);
            _exit(1);
        }
}
static void check_page(struct chunk *c, unsigned long page, const char *when) {
    unsigned long *w = (void *)c->at;
    unsigned long i = page % (CHUNK / 4096) * 512;
    if (w[i] != word(c->number, i)) { printf("wrong %s: chunk %lu page %lu is %lx\n", when, c->number, page, w[i]); fflush(stdout); _exit(1); }
}
static void *work(void *arg) {
    unsigned long seed = (long)arg * 7919 + 1, next = (long)arg * 1000000 + 1;
    struct chunk *c = calloc(chunks, sizeof *c);
    unsigned char *all = mmap(0, (size_t)chunks * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < chunks; i++) { c[i].at = all + (size_t)i * CHUNK; put(&c[i], next++); }
    pthread_barrier_wait(&barrier);
    // The first look comes before anybody says that all are ready, and each look is compared with the one before: a
    // thread that is stopped at a moment that is between no two looks would wait for ever.
    struct timespec a, b, t = {0, 1000000};
    clock_gettime(CLOCK_MONOTONIC, &b);
    pthread_barrier_wait(&barrier);
    if (threads == 1) { puts("ready"); fflush(stdout); }
    do { a = b; nanosleep(&t, 0); clock_gettime(CLOCK_MONOTONIC, &b); }
    while ((b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000 < 100);
    for (int n = 0; n < 3000; n++) {
        seed = seed * 6364136223846793005ul + 1442695040888963407ul;
        struct chunk *k = &c[(seed >> 33) % chunks];
        switch (seed >> 20 & 7) {
        case 0: madvise(k->at, CHUNK, MADV_DONTNEED); k->number = 0; check_page(k, seed >> 40, "after DONTNEED"); break;
        case 1: check(k, "before a move"); /* fall through */
        case 2: {
            void *p = mremap(k->at, CHUNK, CHUNK, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, (void *)0);
            if (p == MAP_FAILED) { perror("mremap"); _exit(1); }
            unsigned char *old = k->at;
            for (int i = 0; i < CHUNK; i += 4096) if (old[i]) { puts("wrong: content stays after a move"); fflush(stdout); _exit(1); }
            munmap(old, CHUNK);
            k->at = p;
            break;
        }
        case 3: {
            // Grown, used, and shrunk again.
            unsigned char *p = mremap(k->at, CHUNK, 2 * CHUNK, MREMAP_MAYMOVE);
            for (int i = 0; i < CHUNK; i += 4096) if (p[CHUNK + i]) { puts("wrong: grown memory is not zero"); fflush(stdout); _exit(1); }
            mremap(p, 2 * CHUNK, CHUNK, 0);
            k->at = p;
            break;
        }
        case 4: {
            munmap(k->at, CHUNK);
            k->at = mmap(0, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            k->number = 0;
            check(k, "after munmap");
            break;
        }
        case 5: put(k, next++); break;
        case 6: check(k, "at random"); break;
        case 7:
            if (arg == 0 && n % 40 == 7) {
                pid_t p = fork();
                if (p == 0) { for (int i = 0; i < chunks; i += 3) check(&c[i], "in a child"); _exit(0); }
                int s; waitpid(p, &s, 0);
                if (s) _exit(1);
            } else mprotect(k->at + CHUNK / 2, 4096, PROT_READ), mprotect(k->at + CHUNK / 2, 4096, PROT_READ | PROT_WRITE);
        }
    }
    for (int i = 0; i < chunks; i++) check(&c[i], "at the end");
    return 0;
}
// MEGABYTES [1]: with the second argument all is done by the first thread.
int main(int argc, char **argv) {
    threads = argc > 2 ? 1 : THREADS;
    chunks = (argc > 1 ? atoi(argv[1]) : 32) * 16 / threads;
    if (threads == 1) {
        pthread_barrier_init(&barrier, 0, 1);
        work((void *)0);
        puts("all right");
        return 0;
    }
    pthread_barrier_init(&barrier, 0, THREADS + 1);
    pthread_t t[THREADS];
    for (long i = 0; i < THREADS; i++) pthread_create(&t[i], 0, work, (void *)i);
    for (int i = 0; i < 2; i++) pthread_barrier_wait(&barrier);
    puts("ready"); fflush(stdout);
    for (int i = 0; i < THREADS; i++) pthread_join(t[i], 0);
    puts("all right");
    return 0;
}
