// Four threads beside the first, each with an alternate stack: one sleeps, one changes its stack all the time, one takes
// signals, and one ends at SIGUSR2 to the process. Prints their numbers.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_barrier_t barrier;
static volatile int numbers[4];
static volatile sig_atomic_t end;

static void nothing(int s) { (void)s; }
static void on_end(int s) { (void)s; end = 1; }
static void stack(size_t size) {
    static _Thread_local char *memory;
    if (!memory) memory = malloc(1 << 20);
    stack_t s = {.ss_sp = memory, .ss_size = size};
    if (sigaltstack(&s, 0)) _exit(1);
}
static void *work(void *arg) {
    long n = (long)arg;
    stack(64 << 10);
    numbers[n] = gettid();
    pthread_barrier_wait(&barrier);
    for (size_t i = 0;; i++) switch (n) {
    case 0: sleep(1000); break;
    case 1: stack((i % 8 + 2) * (64 << 10)); usleep(500); break;
    case 2: pthread_kill(pthread_self(), SIGUSR1); usleep(500); break;
    case 3: if (end) return 0; usleep(500);
    }
}
int main(void) {
    signal(SIGUSR1, nothing);
    signal(SIGUSR2, on_end);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    pthread_barrier_init(&barrier, 0, 5);
    for (long i = 0; i < 4; i++) { pthread_t t; pthread_create(&t, 0, work, (void *)i); }
    pthread_barrier_wait(&barrier);
    pthread_sigmask(SIG_UNBLOCK, &set, 0);
    printf("%d %d %d %d\n", numbers[0], numbers[1], numbers[2], numbers[3]);
    fflush(stdout);
    for (;;) pause();
}
