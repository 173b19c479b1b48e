// The target of process-torture: does all at once that a snapshot could hurt, and checks it. How it is can be read in
// `status`, whose address it prints; so a copy beside it tells about itself and not about the original.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef _Atomic uint64_t word;
#define WRITERS 4
#define INTERVAL 5000000ul
// Its order is known to the suite (process-torture).
static struct {
    word magic, errors, quiet, still;
    word beats, maps, forks, threads, piped, streamed, depth, rounds[WRITERS];
    word sent, got, got_outside, disorder, disorder_outside;
    word ticks, ticks_begin, tick_at, resets;
    char first[256];
} status __attribute__((aligned(4096)));

#define DEPTH 512
#define CHURNERS 3
#define WORK static __attribute__((noreturn)) void *
static int own_signal, outside_signal, tick_signal;

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ul;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
    return x ^ (x >> 31);
}
static void wrong(const char *form, ...) {
    if (atomic_fetch_add(&status.errors, 1) != 0) return;
    va_list list;
    va_start(list, form);
    vsnprintf(status.first, sizeof status.first, form, list);
    va_end(list);
}
static void rest(long ns) {
    struct timespec t = {0, ns};
    nanosleep(&t, 0);
}
static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ul + t.tv_nsec;
}
static void must(int good, const char *what) {
    if (good) return;
    perror(what);
    exit(1);
}
// The end of a round. There is no mapping, thread or child of it while the suite looks.
static void done(word *rounds, long pause) {
    ++*rounds;
    if (status.quiet) {
        status.still++;
        while (status.quiet) rest(1000000);
        status.still--;
    }
    rest(pause);
}

// Each page holds what follows from its number and its version; the versions are kept apart.
static size_t pages;
WORK writer(void *arg) {
    uint64_t me = (uintptr_t)arg, seed = me;
    uint64_t *all = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *version = mmap(0, pages * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(all != MAP_FAILED && version != MAP_FAILED, "mmap");
    for (size_t row = 0;; rest(row < pages ? 1 : 4000000)) {
        status.rounds[me]++;
        for (int k = 0; k < 64; k++) {
            // All in a row, again and again, and between them any. Of the odd ones each is written once, and then only read.
            size_t page = k % 2 ? row++ % pages : mix(seed++) % pages;
            uint64_t *w = all + page * 512, *v = version + page;
            for (int i = 0; i < 512; i++)
                if (w[i] != (*v ? mix(me << 56 | page << 36 | (*v * 512 + i)) : 0)) {
                    wrong("writer %d, page %zu, version %lu, word %d at %p is %lx", (int)me, page, *v, i, w + i, w[i]);
                    break;
                }
            if (page % 2 && *v) continue;
            ++*v;
            for (int i = 0; i < 512; i++) w[i] = mix(me << 56 | page << 36 | (*v * 512 + i));
        }
    }
}
WORK mapper(void *arg) {
    (void)arg;
    for (uint64_t n = 1;; n++, done(&status.maps, 1500000)) {
        size_t len = (1 + mix(n) % 64) * 4096, words = len / 8;
        uint64_t *a = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (size_t i = 0; i < words; i++) {
            if (a[i]) wrong("a new mapping has %lx", a[i]);
            a[i] = n + i;
        }
        uint64_t *b = mremap(a, len, 2 * len, MREMAP_MAYMOVE);
        must(b != MAP_FAILED, "mremap");
        for (size_t i = 0; i < 2 * words; i++)
            if (b[i] != (i < words ? n + i : 0)) wrong("word %zu of a moved mapping is %lx", i, b[i]);
        madvise(b, len, MADV_DONTNEED);
        for (size_t i = 0; i < words; i += 512)
            if (b[i]) wrong("what was given up has %lx", b[i]);
        munmap(b, 2 * len);
    }
}
WORK forker(void *arg) {
    (void)arg;
    enum { N = 1 << 16 };
    uint64_t *m = mmap(0, N * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(m != MAP_FAILED, "mmap");
    for (uint64_t n = 1;; n++, done(&status.forks, 30000000)) {
        for (int i = 0; i < N; i += 64) m[i] = n + i;
        pid_t child = fork();
        must(child >= 0, "fork");
        if (!child) {
            for (int i = 0; i < N; i += 64)
                if (m[i] != n + i) _exit(8);
            _exit(7);
        }
        // What the parent writes must not come to the child.
        for (int i = 0; i < N; i += 64) m[i] = ~0ul;
        int s = 0;
        while (waitpid(child, &s, 0) < 0 && errno == EINTR) {}
        if (!WIFEXITED(s) || WEXITSTATUS(s) != 7) wrong("a child ended with %x", s);
    }
}
static void *guest(void *arg) { return (void *)mix((uintptr_t)arg); }
WORK threader(void *arg) {
    (void)arg;
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_setstacksize(&a, 128 << 10);
    for (uint64_t n = 1;; n++, done(&status.threads, 9000000)) {
        pthread_t t;
        void *got = 0;
        must(!pthread_create(&t, &a, guest, (void *)n) && !pthread_join(t, &got), "a thread");
        if (got != (void *)mix(n)) wrong("a thread's result");
    }
}

// A stream of words that follow from their place.
static int put(ssize_t (*f)(int, const void *, size_t), int fd, uint64_t *n, uint64_t salt) {
    uint64_t w[512], k = 1 + mix(*n) % 512;
    for (size_t i = 0; i < k; i++) w[i] = mix(salt + (*n)++);
    for (size_t done = 0; done < k * 8;) {
        ssize_t r = f(fd, (char *)w + done, k * 8 - done);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) return 0;
        done += r;
    }
    return 1;
}
// Reads and checks it until it ends; counts the words.
static void get(int fd, uint64_t salt, word *count, const char *what) {
    uint64_t w[512], n = 0;
    for (size_t have = 0;;) {
        ssize_t r = read(fd, (char *)w + have, sizeof w - have);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) return;
        have += r;
        for (size_t i = 0; i < have / 8; i++, n++)
            if (w[i] != mix(salt + n)) return wrong("word %lu of the %s is %lx", n, what, w[i]);
        *count += have / 8;
        memmove(w, w + have / 8, have % 8);
        have %= 8;
    }
}
static ssize_t quietly(int fd, const void *at, size_t len) { return send(fd, at, len, MSG_NOSIGNAL); }
static int pipes[2], listener;
static struct sockaddr_in address = {.sin_family = AF_INET};

WORK pipe_writer(void *arg) {
    (void)arg;
    for (uint64_t n = 0;; rest(2000000))
        if (!put(write, pipes[1], &n, 0)) wrong("writing to the pipe: %s", strerror(errno));
}
WORK pipe_reader(void *arg) {
    (void)arg;
    get(pipes[0], 0, &status.piped, "pipe");
    wrong("the pipe has ended: %s", strerror(errno));
    for (;;) pause();
}
// Only a copy's connection may be reset; it makes another one.
WORK talker(void *arg) {
    (void)arg;
    for (;; rest(10000000)) {
        int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        must(s >= 0, "socket");
        uint64_t n = 0;
        if (!connect(s, (void *)&address, sizeof address))
            while (put(quietly, s, &n, 7)) rest(2000000);
        status.resets++;
        close(s);
    }
}
WORK hearer(void *arg) {
    (void)arg;
    for (;;) {
        int s = accept4(listener, 0, 0, SOCK_CLOEXEC);
        if (s < 0) continue;
        get(s, 7, &status.streamed, "stream");
        status.resets++;
        close(s);
    }
}

// All signals come to the first thread, one after the other, so they come in the order in which they were sent.
static void on_signal(int signal, siginfo_t *info, void *context) {
    (void)context;
    uint64_t value = (uintptr_t)info->si_value.sival_ptr;
    if (signal == tick_signal) {
        status.ticks += 1 + info->si_overrun;
        status.tick_at = now();
    } else if (signal == own_signal) {
        if (status.got++ != value) {
            if (!status.disorder++) wrong("signal %lu came as number %lu", value, status.got - 1);
        }
    } else if (status.got_outside++ != value) {
        if (!status.disorder_outside++) wrong("outside signal %lu came as number %lu", value, status.got_outside - 1);
    }
}
WORK sender(void *arg) {
    (void)arg;
    for (;; rest(1000000))
        // A dozen wait at once, at times.
        for (int k = mix(status.sent) % 12; k >= 0 && status.sent - status.got < 64; k--) {
            union sigval v = {.sival_ptr = (void *)status.sent};
            if (sigqueue(getpid(), own_signal, v)) break;
            status.sent++;
        }
}
static __attribute__((noinline)) uint64_t deep(uint64_t n) {
    volatile uint64_t frame[500];
    for (int i = 0; i < 500; i += 7) frame[i] = n + i;
    uint64_t below = n ? deep(n - 1) : 0;
    for (int i = 0; i < 500; i += 7)
        if (frame[i] != n + i) wrong("the stack, %lu deep", n);
    return below + frame[n % 70 * 7] - n % 70 * 7;
}

// MEGABYTES
int main(int argc, char **argv) {
    pages = (argc > 1 ? atoi(argv[1]) : 96) * 256ul / WRITERS;
    own_signal = SIGRTMIN + 3, outside_signal = SIGRTMIN + 2, tick_signal = SIGRTMIN + 1;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigset_t set;
    sigemptyset(&set);
    int all[] = {own_signal, outside_signal, tick_signal};
    for (int i = 0; i < 3; i++) sigaddset(&set, all[i]);
    action.sa_mask = set;
    for (int i = 0; i < 3; i++) sigaction(all[i], &action, 0);
    pthread_sigmask(SIG_BLOCK, &set, 0);

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t len = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(!bind(listener, (void *)&address, len) && !listen(listener, 8), "listen");
    must(!getsockname(listener, (void *)&address, &len) && !pipe(pipes), "pipe");

    pthread_t t;
    void *(*work[])(void *) = {mapper, forker, threader, pipe_writer, pipe_reader, talker, hearer, sender};
    for (uintptr_t i = 0; i < WRITERS; i++) must(!pthread_create(&t, 0, writer, (void *)i), "a thread");
    for (size_t i = 0; i < sizeof work / sizeof *work; i++) must(!pthread_create(&t, 0, work[i], 0), "a thread");

    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = tick_signal};
    uint64_t begin = now() + 10000000;
    struct timespec first = {(begin + INTERVAL) / 1000000000, (begin + INTERVAL) % 1000000000};
    struct itimerspec spec = {{0, INTERVAL}, first};
    status.ticks_begin = begin;
    must(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, TIMER_ABSTIME, &spec, 0), "a timer");
    printf("%p %d %d\n", (void *)&status, CHURNERS, outside_signal);
    fflush(stdout);
    status.magic = 0x746f7274757265;
    pthread_sigmask(SIG_UNBLOCK, &set, 0);
    for (;;) {
        status.beats++;
        rest(1000000);
        // Now and then the stack grows a bit.
        if (status.depth < DEPTH && status.beats % 32 == 0) status.depth++;
        uint64_t d = mix(status.beats) % 8 ? status.depth / 16 : status.depth;
        uint64_t got = deep(d);
        if (got != d * (d + 1) / 2) wrong("a sum on the stack, %lu deep: %lu", d, got);
    }
}
