#include <stdint.h>
#include <string.h>
/* The peer of bench_plan_ranges.py: the walk of the seed for 512 PTEs, from a byte a PTE to the order of each page's folio.
 *
 * 64 chunks of 8 PTEs, compared eight at a time, an explicit stack, and the threshold in percent. Isolation's own check of
 * a run, which plan_ranges makes, is left out, so that the two agree where max_ptes_none is 0.
 */
struct state { uint8_t order, offset; };
static long walk(uint64_t map, unsigned long enabled, int max_none, int8_t *out) {
	struct state stack[64]; int top = -1; long collapsed = 0;
	int percent = ((512 - max_none - 1) * 100) / 511;
	stack[++top] = (struct state){ 6, 0 };
	while (top >= 0) {
		struct state s = stack[top--]; int chunks = 1 << s.order;
		if (enabled >> (s.order + 3) & 1) {
			uint64_t part = map >> s.offset;
			if (chunks < 64) part &= (1ULL << chunks) - 1;
			int bits = __builtin_popcountll(part);
			if (bits && bits >= percent * chunks / 100) {
				memset(out + s.offset * 8, s.order + 3, chunks * 8);
				collapsed += chunks * 8; continue;
			}
		}
		if (s.order) {
			stack[++top] = (struct state){ s.order - 1, s.offset + chunks / 2 };
			stack[++top] = (struct state){ s.order - 1, s.offset };
		}
	}
	return collapsed;
}
long plan_all(const uint8_t *pte, long ranges, unsigned long enabled, int max_none, int8_t *out) {
	long total = 0;
	for (long r = 0; r < ranges; r++) {
		const uint8_t *p = pte + r * 512; uint64_t map = 0;
		for (int i = 0; i < 512; i++) out[r * 512 + i] = p[i] ? 0 : -1;
		for (int c = 0; c < 64; c++) { uint64_t w; memcpy(&w, p + c * 8, 8); map |= (uint64_t)(w == 0x0101010101010101ULL) << c; }
		total += walk(map, enabled, max_none, out + r * 512);
	}
	return total;
}
