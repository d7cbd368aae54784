/* One set-associative LRU array in plain C: the peer of bench_tlb.py. Returns the number of misses. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

long lru_misses(const int64_t *tags, long count, long sets, long ways)
{
	int64_t *lines = malloc(sizeof(int64_t) * sets * ways);
	long misses = 0;

	memset(lines, 0xff, sizeof(int64_t) * sets * ways);
	for (long i = 0; i < count; i++) {
		int64_t *line = lines + (tags[i] & (sets - 1)) * ways;
		long at = 0;

		while (at < ways && line[at] != tags[i])
			at++;
		if (at == ways) {
			misses++;
			at = ways - 1;
		}
		memmove(line + 1, line, at * sizeof(int64_t));
		line[0] = tags[i];
	}
	free(lines);
	return misses;
}
