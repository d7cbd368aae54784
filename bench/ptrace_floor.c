/* The ptrace requests of a window that no tracer can omit, for a child with some number of sleeping threads: seize,
 * interrupt, wait, read registers, mask and rseq's area, set both, set both again, detach. No memory is moved. */
#define _GNU_SOURCE
#include <dirent.h>
#include <elf.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 256
#define GET_RSEQ_CONFIGURATION 0x420f

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000l + time.tv_nsec;
}

static void *wait_for_ever(void *argument)
{
    for (;;)
        pause();
    return argument;
}

static int compare(const void *one, const void *other)
{
    long a = *(const long *)one, b = *(const long *)other;
    return (a > b) - (a < b);
}

static struct user_regs_struct registers[MOST];
static struct iovec vectors[MOST];
static unsigned long masks[MOST], rseq[MOST][3];

static long once(const int *tids, int threads)
{
    int status;
    long begun = now();
    for (int i = 0; i < threads; i++)
        ptrace(PTRACE_SEIZE, tids[i], 0, 0);
    for (int i = 0; i < threads; i++)
        ptrace(PTRACE_INTERRUPT, tids[i], 0, 0);
    for (int i = 0; i < threads; i++)
        waitpid(tids[i], &status, __WALL);
    for (int i = 0; i < threads; i++) {
        vectors[i] = (struct iovec){&registers[i], sizeof registers[i]};
        ptrace(PTRACE_GETREGSET, tids[i], NT_PRSTATUS, &vectors[i]);
        ptrace(PTRACE_GETSIGMASK, tids[i], 8, &masks[i]);
        ptrace(GET_RSEQ_CONFIGURATION, tids[i], sizeof rseq[i], rseq[i]);
    }
    for (int turn = 0; turn < 2; turn++)
        for (int i = 0; i < threads; i++) {
            ptrace(PTRACE_SETREGSET, tids[i], NT_PRSTATUS, &vectors[i]);
            ptrace(PTRACE_SETSIGMASK, tids[i], 8, &masks[i]);
        }
    for (int i = 0; i < threads; i++)
        ptrace(PTRACE_DETACH, tids[i], 0, 0);
    return now() - begun;
}

/* The median of `rounds` rounds, in nanoseconds. */
long ptrace_floor(int threads, int rounds)
{
    int tids[MOST], found = 0;
    char path[64];
    long times[1024];
    pid_t child = fork();
    if (child == 0) {
        pthread_t thread;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 1; i < threads; i++)
            pthread_create(&thread, NULL, wait_for_ever, NULL);
        wait_for_ever(NULL);
    }
    usleep(200000);
    snprintf(path, sizeof path, "/proc/%d/task", child);
    DIR *directory = opendir(path);
    for (struct dirent *entry; (entry = readdir(directory));)
        if (entry->d_name[0] != '.' && found < MOST)
            tids[found++] = atoi(entry->d_name);
    closedir(directory);
    int policy = sched_getscheduler(0);
    struct sched_param first = {1}, ordinary = {0};
    sched_setscheduler(0, SCHED_FIFO, &first);
    for (int round = 0; round < rounds; round++) {
        times[round] = once(tids, found);
        usleep(2000);
    }
    sched_setscheduler(0, policy, &ordinary);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    qsort(times, rounds, sizeof *times, compare);
    return times[rounds / 2];
}
