/* Threads whose memory is many small mappings, which come, go, split and join all the time. Every word says where it is
 * and how often its page was written; what is wrong is counted. One thread moves the end of the heap, and beside all that
 * there is a stack that grows, and a guard page beside each mapping. Compiled and run by test_collapse_small.py.
 *
 * mover_small FILE THREADS: FILE holds 8 words of 64 bits: stop, ready, rounds, errors, grows, its size.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS 48
#define MAX_PAGES 96
#define MAX_THREADS 16

static volatile uint64_t *control;
enum { STOP, READY, ROUNDS, ERRORS, GROWS, GROWS_SIZE };
static long page;

struct slot {
    uint64_t *at;
    size_t pages;
    uint32_t written[MAX_PAGES]; /* 0: never, so it reads as zeroes. */
};

/* Not from malloc, which would take the end of the heap for itself. */
static struct slot all_slots[MAX_THREADS][SLOTS];

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void count(int word, uint64_t more)
{
    __atomic_fetch_add(&control[word], more, __ATOMIC_RELAXED);
}

static uint64_t expected(uint64_t *word, uint32_t written)
{
    return written ? mix((uintptr_t)word + ((uint64_t)written << 48)) : 0;
}

static void write_page(struct slot *s, size_t number)
{
    uint64_t *word = s->at + number * page / 8;
    s->written[number]++;
    for (long i = 0; i < page / 8; i++)
        word[i] = expected(&word[i], s->written[number]);
}

static void check_page(struct slot *s, size_t number)
{
    uint64_t *word = s->at + number * page / 8, wrong = 0;
    for (long i = 0; i < page / 8; i++)
        wrong += word[i] != expected(&word[i], s->written[number]);
    if (wrong)
        count(ERRORS, wrong);
}

/* A mapping with a page that may not be touched on each side; the kernel chooses where, so neighbours share PMD ranges. */
static void make(struct slot *s, uint64_t random)
{
    s->pages = 3 + random % (MAX_PAGES - 3);
    char *all = mmap(NULL, (s->pages + 2) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        abort();
    s->at = (uint64_t *)(all + page);
    if (mprotect(s->at, s->pages * page, PROT_READ | PROT_WRITE))
        abort();
    for (size_t i = 0; i < s->pages; i++) {
        s->written[i] = random >> 40 & 0xff;
        write_page(s, i);
    }
}

static void drop(struct slot *s)
{
    munmap((char *)s->at - page, (s->pages + 2) * page);
}

/* Split it in three by permissions, read all, and have it joined again. */
static void split(struct slot *s, size_t number)
{
    char *at = (char *)s->at + number * page;
    if (mprotect(at, page, PROT_READ))
        abort();
    for (size_t i = 0; i < s->pages; i++)
        check_page(s, i);
    if (mprotect(at, page, PROT_READ | PROT_WRITE))
        abort();
}

static void *work(void *argument)
{
    uint64_t random = (uintptr_t)argument * 77 + 1;
    struct slot *slots = all_slots[(uintptr_t)argument - 1];
    for (int i = 0; i < SLOTS; i++)
        make(&slots[i], mix(random + i));
    count(READY, 1);
    while (!control[STOP]) {
        random = mix(random + 0x9e3779b97f4a7c15u);
        struct slot *s = &slots[random % SLOTS];
        size_t number = (random >> 16) % s->pages;
        for (size_t i = 0; i < s->pages; i++)
            check_page(s, i);
        switch (random >> 32 & 15) {
        case 0:
            drop(s);
            make(s, random);
            break;
        case 1:
        case 2:
            split(s, number);
            break;
        case 3:
            madvise((char *)s->at + number * page, page, MADV_DONTNEED);
            s->written[number] = 0;
            break;
        default:
            for (size_t i = 0; i < 8; i++)
                write_page(s, (number + i) % s->pages);
        }
        count(ROUNDS, 1);
    }
    for (int i = 0; i < SLOTS; i++)
        for (size_t j = 0; j < slots[i].pages; j++)
            check_page(&slots[i], j);
    return NULL;
}

static void *move_the_end_of_the_heap(void *unused)
{
    struct slot s = {0};
    count(READY, 1);
    for (uint64_t random = 1; !control[STOP]; random = mix(random)) {
        s.pages = 16 + random % (MAX_PAGES - 16);
        s.at = sbrk(s.pages * page);
        if (s.at == (void *)-1)
            abort();
        for (int round = 0; round < 20; round++)
            for (size_t i = 0; i < s.pages; i++) {
                if (round)
                    check_page(&s, i);
                write_page(&s, i);
            }
        sbrk(-(long)(s.pages * page));
        count(ROUNDS, 1);
    }
    return unused;
}

int main(int count_of_arguments, char **arguments)
{
    int threads = count_of_arguments > 2 ? atoi(arguments[2]) % (MAX_THREADS + 1) : 1;
    int fd = open(arguments[1], O_RDWR);
    control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    page = sysconf(_SC_PAGESIZE);
    /* Beginning at the alignment that malloc does not keep, which is what sbrk() returns here. */
    if ((uintptr_t)sbrk(0) % page)
        sbrk(page - (uintptr_t)sbrk(0) % page);
    char *grows = mmap(NULL, 64 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
    for (long i = 0; i < 64 * page; i++)
        grows[i] = i % 251;
    control[GROWS] = (uintptr_t)grows;
    control[GROWS_SIZE] = 64 * page;
    pthread_t all[MAX_THREADS + 1];
    for (long i = 1; i <= threads; i++)
        pthread_create(&all[i], NULL, work, (void *)i);
    pthread_create(&all[0], NULL, move_the_end_of_the_heap, NULL);
    for (long i = 0; i <= threads; i++)
        pthread_join(all[i], NULL);
    for (long i = 0; i < 64 * page; i++)
        if (grows[i] != (char)(i % 251))
            count(ERRORS, 1);
    return 0;
}
