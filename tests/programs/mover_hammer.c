/* Threads that write and check memory all the time: every line of 64 bytes says which one it is and how often it was
 * written, and only its own thread writes it. Compiled and loaded by test_mover_guarded.py. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define WORDS 8

struct hammer {
    volatile uint64_t *base;
    uint64_t lines, threads;
    uint32_t *written;
    pthread_t thread[64];
    volatile int stop;
    uint64_t errors, rounds;
};

struct job {
    struct hammer *hammer;
    uint64_t number;
};

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t expected(struct hammer *h, uint64_t line, int word)
{
    return mix(line * WORDS + word + ((uint64_t)h->written[line] << 40));
}

static uint64_t check(struct hammer *h, uint64_t line)
{
    uint64_t wrong = 0;
    for (int word = 0; word < WORDS; word++)
        wrong += h->base[line * WORDS + word] != expected(h, line, word);
    return wrong;
}

static void write_line(struct hammer *h, uint64_t line)
{
    for (int word = 0; word < WORDS; word++)
        h->base[line * WORDS + word] = expected(h, line, word);
}

static void *work(void *argument)
{
    struct job job = *(struct job *)argument;
    struct hammer *h = job.hammer;
    uint64_t random = job.number + 1, errors = 0, rounds = 0;
    free(argument);
    while (!h->stop) {
        random = mix(random + 0x9e3779b97f4a7c15u);
        uint64_t line = random % (h->lines / h->threads) * h->threads + job.number;
        errors += check(h, line);
        h->written[line]++;
        write_line(h, line);
        rounds++;
    }
    __atomic_fetch_add(&h->errors, errors, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&h->rounds, rounds, __ATOMIC_SEQ_CST);
    return NULL;
}

struct hammer *hammer_start(void *base, uint64_t size, uint64_t threads)
{
    struct hammer *h = calloc(1, sizeof *h);
    h->base = base;
    h->lines = size / 64;
    h->threads = threads;
    h->written = calloc(h->lines, sizeof *h->written);
    for (uint64_t line = 0; line < h->lines; line++)
        write_line(h, line);
    for (uint64_t number = 0; number < threads; number++) {
        struct job *job = malloc(sizeof *job);
        job->hammer = h;
        job->number = number;
        pthread_create(&h->thread[number], NULL, work, job);
    }
    return h;
}

/* Returns the number of wrong words, seen at any time; *rounds the number of lines that were checked and written. */
uint64_t hammer_stop(struct hammer *h, uint64_t *rounds)
{
    h->stop = 1;
    for (uint64_t number = 0; number < h->threads; number++)
        pthread_join(h->thread[number], NULL);
    for (uint64_t line = 0; line < h->lines; line++)
        h->errors += check(h, line);
    *rounds = h->rounds;
    uint64_t errors = h->errors;
    free(h->written);
    free(h);
    return errors;
}
