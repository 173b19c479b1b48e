// Ten threads, each in another state: computing, in nanosleep, in a futex, in read of a pipe, in a signal handler's
// alternate stack, with signals blocked; timers that fire, and a robust mutex. Ends with one line when all did right.
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_int go, woken, itimer, ptimer, rtvalue, blocked_seen;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static __thread int own;
static int failed;

static void fail(const char *what) { printf("failed: %s\n", what); fflush(stdout); failed = 1; }
static void on_alarm(int s) { itimer++; }
static void on_rt(int s, siginfo_t *i, void *c) { ptimer++; rtvalue = i->si_value.sival_int; }
static void on_usr(int s, siginfo_t *i, void *c) { blocked_seen += i->si_value.sival_int; }

static void *computes(void *a) {
    double x = 1; unsigned long n = 0;
    while (!go) { x = x * 1.0000001; n++; if (x > 1e9) x = 1; }
    return (void *)(n > 0 ? 1L : 0L);
}
static void *sleeps(void *a) {
    struct timespec t = {0, 300000000};
    while (!go) if (nanosleep(&t, 0) && errno != EINTR) fail("nanosleep");
    return (void *)1;
}
static void *waits(void *a) {
    own = (long)a;
    pthread_mutex_lock(&mutex);
    while (!go) pthread_cond_wait(&cond, &mutex);
    woken++;
    pthread_mutex_unlock(&mutex);
    if (own != (long)a) fail("thread-local");
    if (syscall(SYS_gettid) == getpid()) fail("tid");
    return (void *)1;
}
static void *polls(void *a) {
    while (!go) { int r = poll(0, 0, 100); if (r != 0 && errno != EINTR) fail("poll"); }
    return (void *)1;
}
int main(void) {
    stack_t ss = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&ss, 0);
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART | SA_ONSTACK};
    sigaction(SIGALRM, &sa, 0);
    struct sigaction rt = {.sa_sigaction = on_rt, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN + 3, &rt, 0);
    struct sigaction us = {.sa_sigaction = on_usr, .sa_flags = SA_SIGINFO};
    sigaction(SIGRTMIN + 5, &us, 0);
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGRTMIN + 5);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    union sigval v = {.sival_int = 5};
    sigqueue(getpid(), SIGRTMIN + 5, v); v.sival_int = 6; sigqueue(getpid(), SIGRTMIN + 5, v);
    v.sival_int = 100; pthread_sigqueue(pthread_self(), SIGRTMIN + 5, v);
    struct itimerval it = {{0, 0}, {1, 500000}};
    setitimer(ITIMER_REAL, &it, 0);
    struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 77};
    timer_t timer; timer_create(CLOCK_MONOTONIC, &ev, &timer);
    struct itimerspec its = {{0, 100000000}, {1, 500000000}};
    timer_settime(timer, 0, &its, 0);
    pthread_t t[10];
    for (long i = 0; i < 10; i++)
        pthread_create(&t[i], 0, i < 2 ? computes : i < 4 ? sleeps : i < 8 ? waits : polls, (void *)(i + 1));
    pthread_setname_np(t[4], "waiter");
    usleep(100000);
    puts("ready"); fflush(stdout);
    struct timespec end, now; clock_gettime(CLOCK_MONOTONIC, &end); end.tv_sec += 20;
    while (itimer < 1 || ptimer < 2) {
        struct timespec s = {0, 10000000}; nanosleep(&s, 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > end.tv_sec) { fail("timers"); break; }
    }
    if (rtvalue != 77) fail("timer's value");
    char name[16] = ""; int e = pthread_getname_np(t[4], name, 16); if (e) { printf("%d ", e); fail("getname"); } if (strcmp(name, "waiter")) { puts(name); fail("name"); }
    pthread_sigmask(SIG_UNBLOCK, &set, 0);
    if (blocked_seen != 111) fail("queued signals");
    pthread_mutex_lock(&mutex); go = 1; pthread_cond_broadcast(&cond); pthread_mutex_unlock(&mutex);
    for (int i = 0; i < 10; i++) { void *r; pthread_join(t[i], &r); if (r != (void *)1) fail("join"); }
    if (woken != 4) fail("woken");
    pthread_t more; pthread_create(&more, 0, polls, 0); pthread_join(more, 0);
    stack_t now_ss; sigaltstack(0, &now_ss); if (now_ss.ss_sp != ss.ss_sp) fail("alternate stack");
    puts(failed ? "bad" : "all right");
    return failed;
}
