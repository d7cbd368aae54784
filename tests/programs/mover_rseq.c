/* A target that is nearly always inside a restartable sequence (rseq(2)).
 *
 * mover_rseq FILE
 *
 * FILE is mapped shared. Each sequence has a number; fate[number % FATES] becomes 1 when it was committed and 2 when it
 * was aborted. It takes glibc 2.35 or later, which registers rseq for every thread.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <unistd.h>

#define FATES 2048

#ifdef __aarch64__
#define NINTH "x9"
#else
#define NINTH "r9"
#endif

struct control {
    volatile uint64_t stop, ready, base, size, number;
    volatile uint8_t fate[FATES];
};

int main(int count, char **words)
{
    if (count != 2 || !__rseq_size)
        return 2;
    prctl(PR_SET_PDEATHSIG, 9);
    int fd = open(words[1], O_RDWR);
    struct control *control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    const size_t size = 256 * sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (char *)(((uintptr_t)memory + size - 1) / size * size);
    memset(memory, 7, size);
    control->base = (uint64_t)memory;
    control->size = size;
    control->ready = 1;
    while (!control->stop) {
        uint64_t turns = 8000000;
        long aborted = 0;
        control->number++;
        control->fate[control->number % FATES] = 0;
        __asm__ volatile(
            ".pushsection __rseq_cs, \"aw\"\n"
            ".balign 32\n"
            "3: .long 0, 0\n"
            ".quad 1f, (2f - 1f), 4f\n"
            ".popsection\n"
#ifdef __aarch64__
            "adrp x9, 3b\n"
            "add x9, x9, :lo12:3b\n"
            "str x9, [%[area], %[offset]]\n"
            "1:\n"
            "5: subs %[turns], %[turns], #1\n"
            "b.ne 5b\n"
            "2:\n"
            "b 6f\n"
            ".long %c[signature]\n"
            "4:\n"
            "mov %[aborted], #1\n"
#else
            "lea 3b(%%rip), %%r9\n"
            "mov %%r9, %c[offset](%[area])\n"
            "1:\n"
            "5: dec %[turns]\n"
            "jnz 5b\n"
            "2:\n"
            "jmp 6f\n"
            ".long %c[signature]\n"
            "4:\n"
            "mov $1, %[aborted]\n"
#endif
            "6:\n"
            : [turns] "+r"(turns), [aborted] "+r"(aborted)
            : [area] "r"(area), [offset] "i"(offsetof(struct rseq, rseq_cs)), [signature] "i"(RSEQ_SIG)
            : NINTH, "memory", "cc");
        area->rseq_cs = 0;
        control->fate[control->number % FATES] = aborted ? 2 : 1;
    }
    return 0;
}
