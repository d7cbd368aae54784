/* The peer of bench_plan_ranges.py: the seed's walk as plain C, one 64-bit bitmap a range, popcount, explicit stack.
 *
 * x86-64 geometry: 512 PTEs a range, chunks of 8 PTEs, so 64 bits; orders 9 down to 3, all enabled.
 */
#include <stdint.h>
#include <string.h>

enum { PTES = 512, PMD_ORDER = 9, MIN_ORDER = 3 };

struct run { uint8_t order, chunk; };

static uint64_t field(uint64_t bitmap, int chunk, int chunks)
{
    return chunks == 64 ? bitmap : (bitmap >> chunk) & ((UINT64_C(1) << chunks) - 1);
}

/* Walks ready bitmaps by the threshold alone; gives the number of runs chosen. */
long rfc_walk(const uint64_t *bitmaps, long ranges, int max_ptes_none)
{
    int percent = (PTES - max_ptes_none - 1) * 100 / (PTES - 1);
    long chosen = 0;

    for (long i = 0; i < ranges; i++) {
        struct run stack[PMD_ORDER + 1] = {{PMD_ORDER, 0}};
        int depth = 1;

        while (depth) {
            struct run run = stack[--depth];
            int chunks = 1 << (run.order - MIN_ORDER);
            int set = __builtin_popcountll(field(bitmaps[i], run.chunk, chunks));

            if (set >= percent * chunks / 100) {
                chosen++;
            } else if (run.order > MIN_ORDER) {
                uint8_t half = chunks / 2;
                stack[depth++] = (struct run){run.order - 1, run.chunk + half};
                stack[depth++] = (struct run){run.order - 1, run.chunk};
            }
        }
    }
    return chosen;
}

/* The whole of it, from a byte a PTE to the folios, isolation's own check included; gives the number of folios.
 * With `orders`, the order of each page's folio as well.
 */
long rfc_plan(const uint8_t *present, long ranges, int max_ptes_none, int8_t *orders)
{
    int percent = (PTES - max_ptes_none - 1) * 100 / (PTES - 1);
    long folios = 0;

    for (long i = 0; i < ranges; i++, present += PTES) {
        uint64_t words[PTES / 64] = {0}, bitmap = 0;
        struct run stack[PMD_ORDER + 1] = {{PMD_ORDER, 0}};
        int depth = 1, any = 0;

        for (int pte = 0; pte < PTES; pte++) {
            words[pte / 64] |= (uint64_t)present[pte] << (pte % 64);
        }
        for (int pte = 0; orders && pte < PTES; pte++)
            orders[i * PTES + pte] = present[pte] ? 0 : -1;
        for (int chunk = 0; chunk < 64; chunk++)
            bitmap |= (uint64_t)((words[chunk / 8] >> (chunk % 8 * 8) & 0xff) == 0xff) << chunk;
        for (int word = 0; word < PTES / 64; word++)
            any |= words[word] != 0;
        if (!any)
            continue;
        while (depth) {
            struct run run = stack[--depth];
            int chunks = 1 << (run.order - MIN_ORDER), ptes = 1 << run.order, first = run.chunk * 8, occupied = 0;
            int set = __builtin_popcountll(field(bitmap, run.chunk, chunks));

            if (set >= percent * chunks / 100) {
                if (ptes >= 64)
                    for (int word = first / 64; word < (first + ptes) / 64; word++)
                        occupied += __builtin_popcountll(words[word]);
                else
                    occupied = __builtin_popcountll(words[first / 64] >> (first % 64) & ((UINT64_C(1) << ptes) - 1));
                if (occupied && ptes - occupied <= max_ptes_none >> (PMD_ORDER - run.order)) {
                    if (orders)
                        memset(orders + i * PTES + first, run.order, ptes);
                    folios++;
                    continue;
                }
            }
            if (run.order > MIN_ORDER) {
                uint8_t half = chunks / 2;
                stack[depth++] = (struct run){run.order - 1, run.chunk + half};
                stack[depth++] = (struct run){run.order - 1, run.chunk};
            }
        }
    }
    return folios;
}
