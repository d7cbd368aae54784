/* A target with holes that notices every wrong byte, and how long its threads wait for memory.
 *
 * split_churn THREADS MEGABYTES PERCENT FLAGS
 *
 * Each page belongs to one thread, which checks it and writes it again. PERCENT of the pages are in use, the others are
 * holes. FLAGS: d pages are discarded and new ones are used all the time, u discarded pages are unmapped and mapped
 * again, z they are filled with zeroes instead, b threads own blocks of 64 KiB instead of pages, f threads fork children
 * that check what they see, n all threads let other processes go first, h base pages at first whatever the switches say.
 * The address of the memory and its size are printed first.
 * On SIGCONT the waits so far are forgotten: what was stopped has waited for nothing.
 * On SIGUSR1 all threads discard all that they own and use PERCENT of it again; then a line is printed.
 * On SIGTERM: the number of wrong words, of accesses, and how many of them took 2^n to 2^(n+1) ns, for n from 0 to 39.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 16
#define WORDS 8
#define BUCKETS 40
#define ALIGN (1ul << 25)

static char *memory;
static long threads, percent, page_size;
static size_t pages, group = 1; /* pages that lie together and belong to one thread */
static const char *flags;
static uint32_t *sequence; /* of each page; 0: it reads as zeroes */
static volatile sig_atomic_t stop, asked, continued;
static volatile uint32_t filling, filled[MAX_THREADS]; /* how often memory is to be discarded and used again, and was */
static uint64_t wrong[MAX_THREADS], accesses[MAX_THREADS], took[MAX_THREADS][BUCKETS];

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static volatile uint64_t *word_at(size_t page, int word)
{
    return (volatile uint64_t *)(memory + page * page_size + word * (page_size / WORDS));
}

static uint64_t expected(size_t page, int word)
{
    return sequence[page] ? mix(page * WORDS + word + ((uint64_t)sequence[page] << 40)) : 0;
}

static uint64_t wrong_words(size_t page)
{
    uint64_t count = 0;
    for (int word = 0; word < WORDS; word++)
        count += *word_at(page, word) != expected(page, word);
    return count;
}

static void use(size_t page)
{
    sequence[page]++;
    for (int word = 0; word < WORDS; word++)
        *word_at(page, word) = expected(page, word);
}

static void discard(size_t page)
{
    sequence[page] = 0;
    char *address = memory + page * page_size;
    if (strchr(flags, 'z')) {
        memset(address, 0, page_size);
    } else if (strchr(flags, 'u')) {
        munmap(address, page_size);
        if (mmap(address, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                 -1, 0) != address)
            abort();
    } else {
        madvise(address, page_size, MADV_DONTNEED);
    }
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* The n-th page of a thread. */
static size_t owned(long thread, size_t n)
{
    return (n / group * threads + thread) * group + n % group;
}

static void fill_again(long thread, uint32_t time)
{
    for (size_t n = 0; n < pages / threads; n += group)
        madvise(memory + owned(thread, n) * page_size, group * page_size, MADV_DONTNEED);
    for (size_t n = 0; n < pages / threads; n++) {
        size_t page = owned(thread, n);
        sequence[page] = 0;
        if ((long)(mix(page) % 100) < percent) {
            sequence[page] = time << 16; /* other bytes than before */
            use(page);
        }
    }
    filled[thread] = time;
}

static uint64_t fork_and_check(long thread)
{
    pid_t child = fork();
    if (child == 0) {
        uint64_t count = 0;
        for (size_t n = 0; n < pages / threads; n++)
            count += wrong_words(owned(thread, n));
        _exit(count != 0);
    }
    int status = 0;
    return child > 0 && (waitpid(child, &status, 0) != child || status != 0);
}

static void *run(void *argument)
{
    long thread = (long)argument;
    uint64_t random = thread + 1;
    int churns = strpbrk(flags, "duz") != NULL, forks = strchr(flags, 'f') != NULL;
    sig_atomic_t forgotten = 0;
    for (uint64_t round = 1; !stop; round++) {
        if (filled[thread] != filling)
            fill_again(thread, filling);
        random = mix(random + round);
        size_t page = owned(thread, random % (pages / threads));
        uint64_t begin = now();
        wrong[thread] += wrong_words(page);
        int churn = churns && !(random >> 32 & 1023);
        if (churn && (long)(random >> 40) % 100 >= percent)
            discard(page);
        else if (churn || sequence[page])
            use(page);
        uint64_t length = now() - begin;
        took[thread][length ? 63 - __builtin_clzll(length) : 0]++;
        accesses[thread]++;
        if (forgotten != continued) {
            forgotten = continued;
            memset(took[thread], 0, sizeof took[thread]);
        }
        if (forks && round % 100000 == 0)
            wrong[thread] += fork_and_check(thread);
    }
    return NULL;
}

static void on_term(int number) { stop = number; }
static void on_usr1(int number) { asked = number; }
static void on_cont(int number) { continued += number != 0; }

static int all_filled(void)
{
    for (long thread = 0; thread < threads; thread++)
        if (filled[thread] != filling)
            return 0;
    return 1;
}

/* Answer SIGUSR1 until SIGTERM. */
static void serve(void)
{
    for (; !stop; usleep(500)) {
        if (asked) {
            asked = 0;
            filling++;
        }
        static uint32_t told;
        if (told != filling && all_filled()) {
            told = filling;
            printf("filled\n");
            fflush(stdout);
        }
    }
}

int main(int count, char **words)
{
    if (count != 5)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGTERM, on_term);
    signal(SIGUSR1, on_usr1);
    signal(SIGCONT, on_cont);
    threads = atol(words[1]);
    size_t size = atol(words[2]) << 20;
    percent = atol(words[3]);
    flags = words[4];
    if (strchr(flags, 'n') && nice(15) == -1)
        return 2;
    page_size = sysconf(_SC_PAGESIZE);
    pages = size / page_size;
    if (strchr(flags, 'b'))
        group = (64 << 10) / page_size;
    char *whole = mmap(NULL, size + 2 * ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED || threads < 1 || threads > MAX_THREADS)
        return 2;
    memory = (char *)(((uintptr_t)whole + ALIGN) & ~(ALIGN - 1));
    mprotect(memory, size, PROT_READ | PROT_WRITE);
    if (strchr(flags, 'h'))
        madvise(memory, size, MADV_NOHUGEPAGE);
    sequence = calloc(pages, sizeof *sequence);
    for (size_t page = 0; page < pages; page++)
        if ((long)(mix(page) % 100) < percent)
            use(page);
    if (strchr(flags, 'h'))
        madvise(memory, size, MADV_HUGEPAGE); /* nothing else clears VM_NOHUGEPAGE */
    printf("%lu %zu\n", (unsigned long)memory, size);
    fflush(stdout);
    pthread_t all[MAX_THREADS];
    for (long thread = 0; thread < threads; thread++)
        pthread_create(&all[thread], NULL, run, (void *)thread);
    serve();
    uint64_t errors = 0, total = 0, histogram[BUCKETS] = {0};
    for (long thread = 0; thread < threads; thread++) {
        pthread_join(all[thread], NULL);
        errors += wrong[thread];
        total += accesses[thread];
        for (int n = 0; n < BUCKETS; n++)
            histogram[n] += took[thread][n];
    }
    for (size_t page = 0; page < pages; page++)
        errors += wrong_words(page);
    printf("%lu %lu", (unsigned long)errors, (unsigned long)total);
    for (int n = 0; n < BUCKETS; n++)
        printf(" %lu", (unsigned long)histogram[n]);
    printf("\n");
    return errors != 0;
}
