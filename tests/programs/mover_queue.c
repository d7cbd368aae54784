/* A target that does nothing but wait for queued signals, and says in the end whether they came in order.
 *
 * mover_queue BLOCK_SIZE
 *
 * It says where its memory begins, which is 16 blocks long. The number 0 is the last.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

static volatile sig_atomic_t last, in_order, not_in_order, done;

static void on_queued(int number, siginfo_t *info, void *context)
{
    int value = info->si_value.sival_int;
    (void)number, (void)context;
    if (!value)
        done = 1;
    else if (value == last + 1)
        in_order++;
    else
        not_in_order++;
    last = value;
}

int main(int count, char **words)
{
    if (count != 2)
        return 2;
    const size_t block = strtoul(words[1], NULL, 10), size = 16 * block;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char *memory = mmap(NULL, size + block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (char *)(((uintptr_t)memory + block - 1) / block * block);
    memset(memory, 7, size);
    struct sigaction action = {.sa_sigaction = on_queued, .sa_flags = SA_SIGINFO};
    sigaction(SIGRTMIN + 6, &action, NULL);
    printf("%lu\n", (unsigned long)memory);
    fflush(stdout);
    while (!done)
        pause();
    printf("%d in order, %d not\n", (int)in_order, (int)not_in_order);
    return 0;
}
