/* A target that notices every wrong byte: threads that check and rewrite memory all the time.
 *
 * mover_writers FILE THREADS MEGABYTES FLAGS
 *
 * FILE is mapped shared; the test reads and writes it. The memory is made of lines of 64 bytes. Each line belongs to
 * one thread, which checks seven words of it, raises the line's sequence number, and writes them again. The eighth word
 * of some lines is an atomic counter of all threads. What a line ought to hold is kept in shared memory, which the mover
 * does not touch. FLAGS: f a thread forks all the time, t a thread makes and joins threads, s an interval timer's
 * handler writes to the memory, r queued real-time signals are counted, n all threads let other processes go first.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 128
#define LINE 64
#define WORDS 7
#define BLOCK_LINES 1024

struct control {
    volatile uint64_t stop, ready, base, size, finished, final_errors;
    volatile uint64_t realtime_signals, alarms, forks, spawned, other_errors, longest_gap_ns;
    volatile uint64_t rounds[MAX_THREADS];
    volatile uint64_t errors[MAX_THREADS];
};

static struct control *control;
static char *memory;
static size_t size, lines;
static long threads;
static uint32_t *sequence;
static uint64_t *tally, *alarm_tally;

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static uint64_t *line_at(size_t line) { return (uint64_t *)(memory + line * LINE); }
static uint64_t expected(size_t line, int word, uint32_t seq) { return mix(line * 8 + word + ((uint64_t)seq << 40)); }

static uint64_t wrong_words(size_t line)
{
    volatile uint64_t *words = line_at(line);
    uint64_t wrong = 0;
    for (int word = 0; word < WORDS; word++)
        wrong += words[word] != expected(line, word, sequence[line]);
    return wrong;
}

static void write_words(size_t line)
{
    volatile uint64_t *words = line_at(line);
    for (int word = 0; word < WORDS; word++)
        words[word] = expected(line, word, sequence[line]);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void *writer(void *argument)
{
    long self = (long)argument;
    uint64_t random = mix(self + 1), last = now();
    while (!control->stop) {
        for (int turn = 0; turn < 16; turn++) {
            random = mix(random + 0x9e3779b97f4a7c15ull);
            size_t line = random % (lines / threads) * threads + self;
            uint64_t wrong = wrong_words(line);
            if (wrong) {
                control->errors[self] += wrong;
                write_words(line);
            }
            sequence[line]++;
            write_words(line);
            size_t block = line / BLOCK_LINES;
            if (turn == 0) {
                __atomic_fetch_add(line_at(block * BLOCK_LINES) + 7, 1, __ATOMIC_SEQ_CST);
                __atomic_fetch_add(&tally[block], 1, __ATOMIC_SEQ_CST);
            }
        }
        control->rounds[self]++;
        uint64_t time = now();
        if (time - last > control->longest_gap_ns)
            control->longest_gap_ns = time - last;
        last = time;
    }
    return NULL;
}

static void block_signals(void)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
}

static void *forker(void *argument)
{
    block_signals();
    while (!control->stop) {
        pid_t child = fork();
        if (child == 0)
            _exit(wrong_words(0) > WORDS);
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            control->other_errors++;
        control->forks++;
        usleep(3000);
    }
    return argument;
}

static void *short_lived(void *argument)
{
    __atomic_fetch_add(line_at(BLOCK_LINES + 1 + (long)argument % 8) + 7, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void *spawner(void *argument)
{
    block_signals();
    while (!control->stop) {
        pthread_t some[4];
        for (long i = 0; i < 4; i++)
            if (pthread_create(&some[i], NULL, short_lived, (void *)i))
                exit(3);
        for (int i = 0; i < 4; i++)
            pthread_join(some[i], NULL);
        control->spawned += 4;
    }
    return argument;
}

static void on_alarm(int number)
{
    (void)number;
    __atomic_fetch_add(line_at(2 * BLOCK_LINES + 1) + 7, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(alarm_tally, 1, __ATOMIC_SEQ_CST);
    control->alarms++;
}

static void on_realtime(int number)
{
    (void)number;
    __atomic_fetch_add((uint64_t *)&control->realtime_signals, 1, __ATOMIC_SEQ_CST);
}

static void *map(size_t length, int flags, int fd)
{
    void *address = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (address == MAP_FAILED)
        exit(4);
    return address;
}

int main(int count, char **words)
{
    if (count != 5)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (strchr(words[4], 'n'))
        setpriority(PRIO_PROCESS, 0, 19);
    int fd = open(words[1], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *control))
        return 2;
    control = map(sizeof *control, MAP_SHARED, fd);
    threads = atol(words[2]);
    size = (size_t)atol(words[3]) << 20;
    lines = size / LINE;
    sequence = map(lines * sizeof *sequence, MAP_SHARED | MAP_ANONYMOUS, -1);
    tally = map(lines / BLOCK_LINES * sizeof *tally + 4096, MAP_SHARED | MAP_ANONYMOUS, -1);
    alarm_tally = tally + lines / BLOCK_LINES;
    const size_t page = sysconf(_SC_PAGESIZE), huge = page * (page / 8);
    char *reserved = mmap(NULL, size + 3 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory = (char *)(((uintptr_t)reserved + huge - 1) / huge * huge) + huge;
    mmap(memory, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (size_t line = 0; line < lines; line++)
        write_words(line);

    struct sigaction action = {.sa_flags = SA_RESTART};
    action.sa_handler = on_realtime;
    sigaction(SIGRTMIN, &action, NULL);
    action.sa_handler = on_alarm;
    sigaction(SIGALRM, &action, NULL);
    pthread_t writers[MAX_THREADS], fork_thread, spawn_thread;
    if (strchr(words[4], 'f'))
        pthread_create(&fork_thread, NULL, forker, NULL);
    if (strchr(words[4], 't'))
        pthread_create(&spawn_thread, NULL, spawner, NULL);
    for (long i = 1; i < threads; i++)
        pthread_create(&writers[i], NULL, writer, (void *)i);
    struct itimerval interval = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    if (strchr(words[4], 's'))
        setitimer(ITIMER_REAL, &interval, NULL);
    control->base = (uint64_t)memory;
    control->size = size;
    control->ready = 1;
    writer(0);
    setitimer(ITIMER_REAL, &never, NULL);
    for (long i = 1; i < threads; i++)
        pthread_join(writers[i], NULL);
    if (strchr(words[4], 'f'))
        pthread_join(fork_thread, NULL);
    if (strchr(words[4], 't'))
        pthread_join(spawn_thread, NULL);
    while (control->stop == 1) /* until the test has sent its last signal */
        usleep(1000);

    uint64_t wrong = 0, spawned = 0;
    for (size_t line = 0; line < lines; line++)
        wrong += wrong_words(line);
    for (size_t block = 0; block < lines / BLOCK_LINES; block++)
        wrong += *(line_at(block * BLOCK_LINES) + 7) != tally[block];
    for (int i = 0; i < 8; i++)
        spawned += *(line_at(BLOCK_LINES + 1 + i) + 7);
    wrong += spawned != control->spawned;
    wrong += *(line_at(2 * BLOCK_LINES + 1) + 7) != *alarm_tally;
    control->final_errors = wrong;
    control->finished = 1;
    return wrong != 0;
}
