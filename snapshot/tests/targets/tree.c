// A parent with a child in a group of its own, one in a session of its own, a grandchild, and a zombie. All check who
// they are after they were away; the parent says so.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void away(void) {
    struct timespec a, b, t = {0, 1000000};
    do { clock_gettime(CLOCK_MONOTONIC, &a); nanosleep(&t, 0); clock_gettime(CLOCK_MONOTONIC, &b); }
    while ((b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000 < 100);
}
static int same(pid_t ppid, pid_t pgid, pid_t sid) {
    if (getppid() == ppid && getpgrp() == pgid && getsid(0) == sid) return 0;
    fprintf(stderr, "ppid %d %d pgid %d %d sid %d %d\n", getppid(), ppid, getpgrp(), pgid, getsid(0), sid);
    return 1;
}
int main(void) {
    char *m = malloc(1 << 20); memset(m, 5, 1 << 20);
    setsid();
    pid_t top = getpid(), sid = getsid(0);
    pid_t group = fork();
    if (!group) {
        setpgid(0, 0);
        pid_t grand = fork();
        if (!grand) { pid_t pp = getppid(); away(); _exit(same(pp, pp, sid) ? 1 : 31); }
        away();
        int s, bad = same(top, getpid(), sid) || m[4321] != 5;
        if (waitpid(grand, &s, 0) != grand || WEXITSTATUS(s) != 31) bad = 1;
        _exit(bad ? 1 : 32);
    }
    pid_t session = fork();
    if (!session) { setsid(); m[7] = 9; away(); _exit(same(top, getpid(), getpid()) || m[7] != 9 ? 1 : 33); }
    pid_t zombie = fork();
    if (!zombie) _exit(34);
    pid_t killed = fork();
    if (!killed) { raise(SIGTERM); _exit(0); }
    usleep(200000);
    puts("ready"); fflush(stdout);
    away();
    pid_t all[] = {group, session, zombie, killed};
    int want[] = {32 << 8, 33 << 8, 34 << 8, SIGTERM}, s;
    for (int i = 0; i < 4; i++)
        if (waitpid(all[i], &s, 0) != all[i] || s != want[i]) { printf("child %d: %x\n", i, s); return 1; }
    if (m[7] != 5 || getsid(0) != top) { puts("bad"); return 1; }
    puts("all there");
    return 0;
}
