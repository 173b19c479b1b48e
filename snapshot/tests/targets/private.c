// MADV_DONTNEED and mremap on a private mapping of a file, and on anonymous memory.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    char page[4096];
    memset(page, 'A', 4096);
    if (write(fd, page, 4096) != 4096) return 1;
    memset(page, 'B', 4096);
    if (write(fd, page, 4096) != 4096) return 1;
    char *f = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    char *a = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    f[0] = a[0] = 1;
    madvise(f, 4096, MADV_DONTNEED);
    madvise(a, 4096, MADV_DONTNEED);
    printf("file after DONTNEED: %d\nanonymous after DONTNEED: %d\n", f[0], a[0]);
    f = mremap(f, 4096, 8192, MREMAP_MAYMOVE);
    a = mremap(a, 4096, 8192, MREMAP_MAYMOVE);
    printf("file grown: %d\nanonymous grown: %d\n", f[4096], a[4096]);
    return 0;
}
