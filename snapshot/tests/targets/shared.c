// Shared memory of every kind, between a parent and its child, before and after a resume. With open files of some kinds.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(c) do { if (!(c)) { printf("wrong: line %d, process %s\n", __LINE__, who); fflush(stdout); _exit(1); } } while (0)
#define KINDS 5
static const char *who = "parent";

static int *map(int fd, int flags) {
    int *p = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

int main(int argc, char **argv) {
    (void)argc;
    char name[100], path[200];
    snprintf(name, sizeof name, "/snapshot-test-%d", getpid());
    snprintf(path, sizeof path, "%s/go", argv[1]);
    int *m[KINDS];
    m[0] = map(-1, MAP_ANONYMOUS);
    int memfd = memfd_create("test", 0);
    CHECK(!ftruncate(memfd, 8192));
    m[1] = map(memfd, 0);
    int posix = shm_open(name, O_CREAT | O_RDWR, 0640);
    CHECK(!ftruncate(posix, 8192));
    m[2] = map(posix, 0);
    int gone = open("/dev/shm/snapshot-test-gone", O_CREAT | O_RDWR | O_EXCL, 0600);
    unlink("/dev/shm/snapshot-test-gone");
    CHECK(!ftruncate(gone, 8192));
    m[3] = map(gone, 0);
    int id = shmget(IPC_PRIVATE, 8192, IPC_CREAT | 0600);
    m[4] = shmat(id, 0, 0);
    CHECK(m[4] != (void *)-1);
    shmctl(id, IPC_RMID, 0);
    for (int k = 0; k < KINDS; k++) { m[k][0] = 100 + k; m[k][1500] = 200 + k; }
    int pair[2], pipes[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && !pipe(pipes));
    CHECK(write(pipes[1], "queued", 6) == 6);
    char file[200];
    snprintf(file, sizeof file, "%s/locked", argv[1]);
    int locked = open(file, O_CREAT | O_RDWR, 0600);
    CHECK(!ftruncate(locked, 4096));
    // Mapped from the same file, whose lock must outlive that mapping's own descriptor at the resume.
    char *mapped = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, locked, 0);
    CHECK(mapped != MAP_FAILED);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 5};
    CHECK(!fcntl(locked, F_SETLK, &lock));
    int child = fork();
    if (!child) who = "child";
    if (child) { printf("ready\n"); fflush(stdout); }
    while (access(path, F_OK)) usleep(10000);
    if (!child) {
        char c;
        for (int k = 0; k < KINDS; k++) CHECK(m[k][0] == 100 + k && m[k][1500] == 200 + k && m[k][7] == 0);
        CHECK(read(pair[0], &c, 1) == 1);
        for (int k = 0; k < KINDS; k++) { CHECK(m[k][1] == 300 + k); m[k][2] = 400 + k; }
        struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 100};
        CHECK(!fcntl(locked, F_GETLK, &other) && other.l_type == F_WRLCK && other.l_pid == getppid() && other.l_start == 10);
        CHECK(mapped[5] == 'x');
        _exit(7);
    }
    for (int k = 0; k < KINDS; k++) m[k][1] = 300 + k;
    mapped[5] = 'x';
    CHECK(write(pair[1], "x", 1) == 1);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    for (int k = 0; k < KINDS; k++) CHECK(m[k][2] == 400 + k);
    // Descriptors are of the same objects.
    int word;
    for (int k = 1; k < 4; k++) {
        int fd = k == 1 ? memfd : k == 2 ? posix : gone;
        CHECK(pread(fd, &word, 4, 8) == 4 && word == 400 + k);
    }
    char text[7] = {0};
    CHECK(read(pipes[0], text, 6) == 6 && !strcmp(text, "queued"));
    struct shmid_ds ds;
    CHECK(!shmctl(id, IPC_STAT, &ds) && ds.shm_nattch == 1);
    shm_unlink(name);
    printf("all right\n");
    return 3;
}
