/* A target with a buffer registered with io_uring: the kernel remembers its pages and not their addresses.
 *
 * mover_uring FILE
 *
 * FILE is mapped shared: stop, ready, base, size, outcome. When stop is set, the ring reads new bytes into the buffer
 * by its registration, and outcome becomes 1 if the program sees them there, 2 if it sees the old ones, 3 if all else.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char fresh[256 << 16];

int main(int count, char **words)
{
    if (count != 2)
        return 2;
    const size_t size = 256 * sysconf(_SC_PAGESIZE);
    prctl(PR_SET_PDEATHSIG, 9);
    int fd = open(words[1], O_RDWR);
    volatile uint64_t *control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *memory = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (char *)(((uintptr_t)memory + size - 1) / size * size);
    memset(memory, 7, size);

    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    int ring = syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0)
        return 3;
    struct iovec vector = {memory, size};
    if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1))
        return 3;
    char *queue = mmap(NULL, params.sq_off.array + 4 * params.sq_entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                       IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(NULL, 4 * sizeof *entry, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    int file = memfd_create("new bytes", 0);
    memset(fresh, 9, size);
    if (write(file, fresh, size) != (ssize_t)size)
        return 3;

    control[2] = (uint64_t)memory;
    control[3] = size;
    control[1] = 1;
    while (!control[0])
        usleep(1000);
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READ_FIXED;
    entry->fd = file;
    entry->addr = (uint64_t)memory;
    entry->len = size;
    ((uint32_t *)(queue + params.sq_off.array))[0] = 0;
    __atomic_store_n((uint32_t *)(queue + params.sq_off.tail), 1, __ATOMIC_SEQ_CST);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
        return 3;
    control[4] = !memcmp(memory, fresh, size) ? 1 : memory[0] == 7 ? 2 : 3;
    return 0;
}
