// Counts, and checks a pattern in memory at each step. Ends after it has noticed that it was away.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>

static volatile long counter;
static char data[100000] = "initialised";

static unsigned long sum(const unsigned char *p, size_t n) {
    unsigned long s = 5381;
    for (size_t i = 0; i < n; i++) s = s * 33 + p[i];
    return s;
}

int main(int argc, char **argv) {
    size_t n = (argc > 1 ? atol(argv[1]) : 8) << 20;
    int steps = argc > 2 ? atoi(argv[2]) : 20;
    unsigned char *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < n; i += 8) *(unsigned long *)(p + i) = i * 0x9e3779b97f4a7c15ul;
    unsigned char *h = malloc(300000);
    memset(h, 7, 300000);
    memset(data + 50000, 9, 1000);
    double x = 1.5;
    unsigned long want = sum(p, n), heap = sum(h, 300000), dat = sum((void *)data, sizeof data);
    pid_t pid = getpid();
    struct timespec last, now;
    clock_gettime(CLOCK_MONOTONIC, &last);
    puts("ready");
    fflush(stdout);
    while (counter < steps) {
        struct timespec t = {0, 20000000};
        nanosleep(&t, 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec < last.tv_sec) { puts("clock went back"); return 3; }
        last = now;
        counter++;
        x = x * 1.0 + 0.5;
    }
    if (sum(p, n) != want || sum(h, 300000) != heap || sum((void *)data, sizeof data) != dat) { puts("memory differs"); return 2; }
    if (getpid() != pid) { puts("pid differs"); return 4; }
    char *more = malloc(5 << 20);
    memset(more, 1, 5 << 20);
    free(more);
    printf("counted %ld %.1f\n", counter, x);
    return 42;
}
