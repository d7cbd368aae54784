/*
 * The recorder: stages one PMD range of memory for real, has it collapsed, and tells what can be seen of it.
 *
 * It reads one case a line and answers with one line of JSON, raw: page table entries, folios, counters, trace lines.
 * What they mean is worked out on the host (recorder.py). Static, without threads, for a guest with one CPU: the LRU
 * batches that decide some collapses are those of that CPU.
 *
 *     case ID TRIGGER PASSES ORDERS NONE SWAP SHARED VMA SETUP STATES
 *     case m1 khugepaged 3 4,9 511 64 256 - no_fork anon:300,none:12,large/4:16,cold~:184
 *
 * TRIGGER `calls` is followed by the calls to make instead, one for each pass, behind the states:
 *
 *     case s1 calls 3 9 511 64 256 - no_fork anon:300,none:212 collapse,split/0/1/4,cold/310/1
 *
 * A state with "~" is left unreferenced. Each case has a process of its own, so nothing of one is left for the next,
 * and one that hangs or dies is reported and forgotten. Every page gets contents of its own, checked at the end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define THP "/sys/kernel/mm/transparent_hugepage/"
#define TRACE "/sys/kernel/tracing/"
#define MAX_PAGES 8192
#define MAX_LINE (1 << 20)
#define CASE_SECONDS 60
#define ASLEEP "1000000000"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#define NO_WP_UNPOPULATED (1 << 13) /* UFFD_FEATURE_WP_UNPOPULATED, which old headers do not have */
#define IO_URING_REGISTER_BUFFERS 0
#define MAX_CALLS 16
#define SPLIT_FILE "/sys/kernel/debug/split_huge_pages"

/* kernel-page-flags.h, and Documentation/admin-guide/mm/pagemap.rst */
#define KPF_COMPOUND_HEAD (1ull << 15)
#define KPF_COMPOUND_TAIL (1ull << 16)
#define PM_PRESENT (1ull << 63)
#define PM_SWAP (1ull << 62)
#define PM_PFN ((1ull << 55) - 1)

enum state {
	NONE, ANON, ZERO, SWAP, SHARED, SWAP_SHARED, SWAPCACHE, SWAPPED_BACK, COLD, LAZYFREE, LAZYFREE_DIRTY, MLOCKED,
	PINNED, GUARD, UFFDWP, UFFD_ZERO, UFFD_SWAP, UFFD_MARKER, LARGE, LARGE_SHARED, STATES
};

static const char *const names[STATES] = {
	"none", "anon", "zero", "swap", "shared", "swap_shared", "swapcache", "swapped_back", "cold", "lazyfree",
	"lazyfree_dirty", "mlocked", "pinned", "guard", "uffdwp", "uffd_zero", "uffd_swap", "uffd_marker", "large",
	"large_shared",
};

#define BIT(state) (1u << (state))
#define WRITTEN (~(BIT(NONE) | BIT(ZERO) | BIT(GUARD) | BIT(UFFD_ZERO) | BIT(UFFD_MARKER)))
#define LARGE_ONES (BIT(LARGE) | BIT(LARGE_SHARED))
#define KEPT_BY_CHILD (BIT(SHARED) | BIT(SWAP_SHARED) | BIT(LARGE_SHARED))
#define PAGED_OUT (BIT(SWAP) | BIT(SWAP_SHARED) | BIT(UFFD_SWAP) | BIT(SWAPCACHE) | BIT(SWAPPED_BACK))
#define UFFD_ONES (BIT(UFFDWP) | BIT(UFFD_ZERO) | BIT(UFFD_SWAP) | BIT(UFFD_MARKER))
#define NOT_MAPPED \
	(BIT(NONE) | BIT(SWAP) | BIT(SWAP_SHARED) | BIT(UFFD_SWAP) | BIT(GUARD) | BIT(UFFD_MARKER))
/* Their PTEs became read-only when the child was forked; a write makes them as they were. */
#define REWRITTEN \
	(BIT(ANON) | BIT(COLD) | BIT(LAZYFREE) | BIT(LAZYFREE_DIRTY) | BIT(MLOCKED) | BIT(PINNED) | BIT(UFFDWP) | \
	 BIT(SWAPPED_BACK))

struct call {
	char name[16];
	int first, count, order, at;
};

struct a_case {
	char id[64];
	struct call calls[MAX_CALLS];
	int has_calls;
	int forced, passes, npages;
	uint64_t orders;
	int max_none, max_swap, max_shared;
	int wp, missing, mlocked, droppable, forks, keeps_all;
	unsigned char state[MAX_PAGES], order[MAX_PAGES], old[MAX_PAGES];
	unsigned char written[MAX_PAGES], kept[MAX_PAGES]; /* what a page holds; whether the child has it, too */
};

static size_t page_size, pmd_size;
static int pmd_order, out_fd, kpageflags, kpagecount;
static char *region;
static struct a_case the_case;

/* Failure: a case that cannot be staged says so in its answer, and its process ends. */

static void fail(const char *format, ...)
{
	char text[512], line[1024];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	for (char *c = text; *c; c++)
		if (*c == '"' || *c == '\\' || *c == '\n')
			*c = ' ';
	int n = snprintf(line, sizeof(line), "{\"id\":\"%s\",\"error\":\"%s\"}\n", the_case.id, text);
	if (write(out_fd, line, n) != n)
		_exit(3);
	_exit(2);
}

#define MUST(what) \
	do { \
		if ((long)(what) == -1) \
			fail("%s: %s", #what, strerror(errno)); \
	} while (0)

/* Files. */

static int read_text(const char *path, char *text, size_t room)
{
	int fd = open(path, O_RDONLY), n = 0, got;

	if (fd < 0)
		return -1;
	while (n < (int)room - 1 && (got = read(fd, text + n, room - 1 - n)) > 0)
		n += got;
	close(fd);
	text[n] = 0;
	return n;
}

static long read_number(const char *path)
{
	char text[64];

	return read_text(path, text, sizeof(text)) < 0 ? -1 : atol(text);
}

static int try_write(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_TRUNC);

	if (fd < 0)
		return -1;
	int done = write(fd, text, strlen(text)) == (int)strlen(text) ? 0 : -1;
	close(fd);
	return done;
}

static void write_text(const char *path, const char *text)
{
	if (try_write(path, text))
		fail("%s: %s", path, strerror(errno));
}

static void write_number(const char *path, long number)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld", number);
	write_text(path, text);
}

/*
 * Switches. khugepaged scans at once whenever its thread starts again, so it is kept running: some size stays
 * enabled all the time. `forced` names an order for which faults are to get folios; the PMD size stays on "madvise".
 */
static int has_sizes(void)
{
	DIR *directory = opendir(THP);
	struct dirent *entry;
	int found = 0;

	while (directory && (entry = readdir(directory)))
		found |= !strncmp(entry->d_name, "hugepages-", 10);
	if (directory)
		closedir(directory);
	return found;
}

static void write_sizes(uint64_t orders, const char *word)
{
	char path[256];

	for (int order = 1; order <= pmd_order; order++) {
		if (!(orders >> order & 1))
			continue;
		snprintf(path, sizeof(path), THP "hugepages-%zukB/enabled", (page_size << order) >> 10);
		if (try_write(path, word) && strcmp(word, "never"))
			fail("order %d cannot be enabled", order);
	}
}

static void set_orders(uint64_t orders)
{
	if (!has_sizes()) {
		if (orders != 1ull << pmd_order)
			fail("this kernel has no size but the PMD's");
		write_text(THP "enabled", "madvise");
		return;
	}
	write_text(THP "enabled", "madvise");
	write_sizes(orders, "madvise");
	write_sizes(~orders, "never");
}

static void set_fault_order(int order)
{
	if (!has_sizes()) {
		write_text(THP "enabled", order == pmd_order ? "always" : "madvise");
		return;
	}
	write_sizes(1ull << pmd_order, order == pmd_order ? "always" : "madvise");
	write_sizes(~(1ull << pmd_order), "never");
	if (order && order != pmd_order)
		write_sizes(1ull << order, "always");
}

/* What a page holds: its own number everywhere, so that a page in a wrong place is distinguished from a lost one. */

static uint64_t pattern(int page)
{
	return 0x9e3779b97f4a7c15ull * (page + 1) | 1;
}

static void fill(int page)
{
	uint64_t *words = (uint64_t *)(region + page * page_size);

	for (size_t i = 0; i < page_size / 8; i++)
		words[i] = pattern(page) + i;
}

static int holds(int page, int written)
{
	volatile uint64_t *words = (uint64_t *)(region + page * page_size);

	for (size_t i = 0; i < page_size / 8; i++)
		if (words[i] != (written ? pattern(page) + i : 0))
			return 0;
	return 1;
}

/* Runs of pages in one of `states`: calls back with first page and count. */

static int is(int page, unsigned states)
{
	return states >> the_case.state[page] & 1;
}

static int any(unsigned states)
{
	for (int page = 0; page < the_case.npages; page++)
		if (is(page, states))
			return 1;
	return 0;
}

static void each_run(unsigned states, void (*call)(int first, int count))
{
	for (int page = 0; page < the_case.npages;) {
		int first = page;

		while (page < the_case.npages && is(page, states))
			page++;
		if (page > first)
			call(first, page - first);
		else
			page++;
	}
}

static char *at(int page)
{
	return region + page * page_size;
}

static void advise(int first, int count, int advice)
{
	if (madvise(at(first), count * page_size, advice))
		fail("madvise(%d) of page %d: %s", advice, first, strerror(errno));
}

/* The folios that this CPU has not put on their lists yet hold references; mlock(2) puts them there. */
static void drain(void)
{
	char *page = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*page = 1;
	mlock(page, page_size);
	munlock(page, page_size);
	munmap(page, page_size);
}

/* Looking. */

static uint64_t word_of(int fd, uint64_t index)
{
	uint64_t word = 0;

	if (pread(fd, &word, 8, index * 8) != 8)
		return 0;
	return word;
}

static void read_pagemap(uint64_t *entries)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	size_t bytes = the_case.npages * 8;

	if (fd < 0 || pread(fd, entries, bytes, (uintptr_t)region / page_size * 8) != (ssize_t)bytes)
		fail("pagemap: %s", strerror(errno));
	close(fd);
}

static int order_of(uint64_t pfn)
{
	uint64_t flags = word_of(kpageflags, pfn), head = pfn, end;

	if (!(flags & (KPF_COMPOUND_HEAD | KPF_COMPOUND_TAIL)))
		return 0;
	while (head && !(word_of(kpageflags, head) & KPF_COMPOUND_HEAD))
		head--;
	for (end = pfn + 1; word_of(kpageflags, end) & KPF_COMPOUND_TAIL;)
		end++;
	return 63 - __builtin_clzll(end - head);
}

static long smaps(const char *field)
{
	static char text[1 << 18];
	char range[64];

	if (read_text("/proc/self/smaps", text, sizeof(text)) < 0)
		fail("smaps: %s", strerror(errno));
	snprintf(range, sizeof(range), "%lx-%lx ", (long)region, (long)(region + pmd_size));
	char *place = strstr(text, range);
	if (!place)
		fail("the range is not one mapping any more");
	place = strstr(place, field);
	return place ? atol(place + strlen(field) + 1) : -1;
}

static void print_numbers(FILE *out, const char *name, const uint64_t *numbers)
{
	fprintf(out, ",\"%s\":[", name);
	for (int i = 0; i < the_case.npages;) {
		int j = i;

		while (j < the_case.npages && numbers[j] == numbers[i])
			j++;
		fprintf(out, "%s[%llu,%d]", i ? "," : "", (unsigned long long)numbers[i], j - i);
		i = j;
	}
	fprintf(out, "]");
}

static void look(FILE *out)
{
	static uint64_t entries[MAX_PAGES], orders[MAX_PAGES], flags[MAX_PAGES], counts[MAX_PAGES];

	read_pagemap(entries);
	for (int i = 0; i < the_case.npages; i++) {
		uint64_t pfn = entries[i] & PM_PFN;
		int present = (entries[i] & PM_PRESENT) && pfn;

		flags[i] = present ? word_of(kpageflags, pfn) : 0;
		counts[i] = present ? word_of(kpagecount, pfn) : 0;
		/* Pages that follow one another in one folio need no second search. */
		if (present && i && pfn == (entries[i - 1] & PM_PFN) + 1 && flags[i] & KPF_COMPOUND_TAIL)
			orders[i] = orders[i - 1];
		else
			orders[i] = present ? order_of(pfn) : 0;
	}
	fprintf(out, "{\"huge_kb\":%ld,\"referenced_kb\":%ld,\"rss_kb\":%ld", smaps("AnonHugePages:"), smaps("Referenced:"),
		smaps("Rss:"));
	print_numbers(out, "pagemap", entries);
	print_numbers(out, "order", orders);
	print_numbers(out, "flags", flags);
	print_numbers(out, "count", counts);
	fprintf(out, "}");
}

/* Counters: everything below the sizes' stats, /proc/vmstat, and khugepaged's own. */

#define MAX_COUNTERS 2048

struct counters {
	int n;
	struct {
		char name[128];
		long value;
	} of[MAX_COUNTERS];
};

static void count_one(struct counters *counters, const char *name, long value)
{
	if (counters->n < MAX_COUNTERS) {
		snprintf(counters->of[counters->n].name, sizeof(counters->of[0].name), "%s", name);
		counters->of[counters->n++].value = value;
	}
}

static void count_size(struct counters *counters, const char *size)
{
	char path[600], name[128];
	struct dirent *entry;

	snprintf(path, sizeof(path), THP "%s/stats", size);
	DIR *directory = opendir(path);
	while (directory && (entry = readdir(directory))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), THP "%s/stats/%s", size, entry->d_name);
		snprintf(name, sizeof(name), "%.30s/%.90s", size, entry->d_name);
		count_one(counters, name, read_number(path));
	}
	if (directory)
		closedir(directory);
}

static void count(struct counters *counters)
{
	static char text[1 << 16];
	char name[72];
	long value;
	int used;
	struct dirent *entry;

	counters->n = 0;
	DIR *directory = opendir(THP);
	while (directory && (entry = readdir(directory)))
		if (!strncmp(entry->d_name, "hugepages-", 10))
			count_size(counters, entry->d_name);
	if (directory)
		closedir(directory);
	read_text("/proc/vmstat", text, sizeof(text));
	for (char *line = text; sscanf(line, "%71s %ld%n", name, &value, &used) == 2; line += used)
		count_one(counters, name, value);
	count_one(counters, "full_scans", read_number(THP "khugepaged/full_scans"));
	count_one(counters, "pages_collapsed", read_number(THP "khugepaged/pages_collapsed"));
}

static void print_counters(FILE *out, const struct counters *before, const struct counters *after)
{
	const char *comma = "";

	fprintf(out, ",\"stats\":{");
	for (int i = 0; i < after->n && i < before->n; i++)
		if (after->of[i].value != before->of[i].value) {
			fprintf(out, "%s\"%s\":%ld", comma, after->of[i].name, after->of[i].value - before->of[i].value);
			comma = ",";
		}
	fprintf(out, "}");
}

static void print_trace(FILE *out)
{
	static char text[1 << 20];
	const char *comma = "";

	fprintf(out, ",\"trace\":[");
	read_text(TRACE "trace", text, sizeof(text));
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		char *event = *line == '#' ? NULL : strstr(line, ": mm_");

		if (event) {
			fprintf(out, "%s\"%s\"", comma, event + 2);
			comma = ",";
		}
	}
	fprintf(out, "]");
}

/* Staging. */

static void map_region(void)
{
	/* A hole on either side, so that no neighbour can become one mapping with it. */
	char *room = mmap(NULL, 12 * pmd_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int kind = the_case.droppable ? MAP_DROPPABLE : MAP_PRIVATE;

	MUST(room);
	munmap(room, 12 * pmd_size);
	region = (char *)(((uintptr_t)room / pmd_size + 2) * pmd_size);
	MUST(mmap(region, pmd_size, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
}

static void stage_large(void)
{
	for (int order = pmd_order; order > 0; order--) {
		int size = 1 << order, any = 0;

		for (int block = 0; block < the_case.npages; block += size) {
			int wanted = 0;

			for (int i = block; i < block + size; i++)
				wanted |= is(i, LARGE_ONES) && the_case.order[i] == order;
			if (!wanted)
				continue;
			if (!any++)
				set_fault_order(order);
			at(block)[0] = 1;
			if (order == pmd_order) {
				/* A moment of two mappings, and the PMD entry is a page table. */
				MUST(mprotect(region, page_size, PROT_READ));
				MUST(mprotect(region, page_size, PROT_READ | PROT_WRITE));
			}
			for (int i = block; i < block + size; i++)
				if (is(i, LARGE_ONES) && the_case.order[i] == order)
					fill(i);
				else
					advise(i, 1, MADV_DONTNEED);
		}
	}
	set_fault_order(0);
}

static void stage_pages(void)
{
	volatile char sink;

	for (int i = 0; i < the_case.npages; i++)
		if (is(i, BIT(ZERO) | BIT(UFFD_ZERO)))
			sink = *(volatile char *)at(i);
		else if (is(i, WRITTEN & ~LARGE_ONES))
			fill(i);
	(void)sink;
}

static void page_out(int first, int count)
{
	madvise(at(first), count * page_size, MADV_PAGEOUT);
}

static int all_swapped(void)
{
	static uint64_t entries[MAX_PAGES];

	read_pagemap(entries);
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, PAGED_OUT) && !(entries[i] & PM_SWAP))
			return 0;
	return 1;
}

static pid_t helper;

static void stage_swap(void)
{
	int tries;
	volatile char sink;
	int status;

	for (tries = 0; tries < 20 && !all_swapped(); tries++) {
		drain();
		each_run(PAGED_OUT, page_out);
	}
	if (!all_swapped())
		fail("pages do not go to swap");
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, BIT(SWAPPED_BACK)))
			fill(i);
	/* A page stays in the swap cache while another process has its swap entry. A fork makes all PTEs read-only. */
	if (!any(BIT(SWAPCACHE)))
		return;
	helper = fork();
	MUST(helper);
	if (!helper) {
		pause();
		_exit(0);
	}
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, BIT(SWAPCACHE)))
			sink = *(volatile char *)at(i);
	(void)sink;
	kill(helper, SIGKILL);
	waitpid(helper, &status, 0);
}

static int to_child[2], from_child[2];
static pid_t child;

static void drop(int first, int count)
{
	advise(first, count, MADV_DONTNEED);
}

/* The child keeps what is shared, waits, and at the end tells whether it still holds what it had. */
static void be_child(void)
{
	char word = 'y';

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (write(from_child[1], &word, 1) != 1 || read(to_child[0], &word, 1) != 1)
		_exit(1);
	word = 'y';
	for (int i = 0; i < the_case.npages; i++)
		if (the_case.kept[i] && !holds(i, the_case.written[i]))
			word = 'n';
	if (write(from_child[1], &word, 1) != 1)
		_exit(1);
	_exit(0);
}

static void have_child(void (*prepare)(void))
{
	char word;

	MUST(pipe(to_child));
	MUST(pipe(from_child));
	child = fork();
	MUST(child);
	if (!child) {
		prepare();
		be_child();
	}
	if (read(from_child[0], &word, 1) != 1)
		fail("the child died");
}

static void keep_what_is_shared(void)
{
	advise(0, the_case.npages, MADV_NOHUGEPAGE);
	if (!the_case.keeps_all)
		each_run(~KEPT_BY_CHILD, drop);
	for (int i = 0; i < the_case.npages; i++)
		the_case.kept[i] = is(i, KEPT_BY_CHILD);
}

static void keep_all(void)
{
	memset(the_case.kept, 1, sizeof(the_case.kept));
}

static void stage_child(void)
{
	if (!the_case.forks)
		return;
	have_child(keep_what_is_shared);
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, REWRITTEN))
			fill(i);
}

static void cool(int first, int count)
{
	advise(first, count, MADV_COLD);
}

static void free_lazily(int first, int count)
{
	advise(first, count, MADV_FREE);
}

static void guard(int first, int count)
{
	advise(first, count, MADV_GUARD_INSTALL);
}

static struct iovec buffers[MAX_PAGES];
static int nbuffers;

static void pin_buffers(void)
{
	char params[256] = { 0 }; /* struct io_uring_params is 120 bytes */
	int ring = syscall(__NR_io_uring_setup, 1, params);

	MUST(ring);
	MUST(syscall(__NR_io_uring_register, ring, IO_URING_REGISTER_BUFFERS, buffers, nbuffers));
}

static void add_buffer(int first, int count)
{
	buffers[nbuffers].iov_base = at(first);
	buffers[nbuffers++].iov_len = count * page_size;
}

static void stage_pins(void)
{
	each_run(BIT(PINNED), add_buffer);
	if (nbuffers)
		pin_buffers();
}

static int uffd;

static void write_protect(int first, int count)
{
	struct uffdio_writeprotect wp = {
		.range = { (uintptr_t)at(first), count * page_size },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	MUST(ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
}

static void stage_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register registration = {
		.range = { (uintptr_t)region, pmd_size },
		.mode = (the_case.wp ? UFFDIO_REGISTER_MODE_WP : 0) | (the_case.missing ? UFFDIO_REGISTER_MODE_MISSING : 0),
	};

	if (!the_case.wp && !the_case.missing)
		return;
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, BIT(UFFD_MARKER)))
			api.features = NO_WP_UNPOPULATED;
	uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
	MUST(uffd);
	MUST(ioctl(uffd, UFFDIO_API, &api));
	MUST(ioctl(uffd, UFFDIO_REGISTER, &registration));
	each_run(UFFD_ONES, write_protect);
}

/*
 * clear_refs leaves the TLB as it is, and a page that is read through it does not come to look used. fork(2) flushes
 * it, and would make the pages read-only, were they not kept from the child.
 */
static void flush_tlb(void)
{
	int status;

	advise(0, the_case.npages, MADV_DONTFORK);
	pid_t other = fork();
	MUST(other);
	if (!other)
		_exit(0);
	waitpid(other, &status, 0);
	advise(0, the_case.npages, MADV_DOFORK);
}

/* Which pages are referenced is decided here, and nothing before counts. */
static void stage_references(void)
{
	volatile char sink;

	write_text("/proc/self/clear_refs", "1");
	flush_tlb();
	for (int i = 0; i < the_case.npages; i++)
		if (!is(i, NOT_MAPPED) && !the_case.old[i])
			sink = *(volatile char *)at(i);
	(void)sink;
}

static void stage(void)
{
	map_region();
	stage_large();
	stage_pages();
	stage_swap();
	stage_child();
	each_run(BIT(COLD), cool);
	drain();
	each_run(BIT(LAZYFREE) | BIT(LAZYFREE_DIRTY), free_lazily);
	drain();
	for (int i = 0; i < the_case.npages; i++)
		if (is(i, BIT(LAZYFREE_DIRTY)))
			fill(i);
	stage_pins();
	each_run(BIT(GUARD), guard);
	stage_uffd();
	if (the_case.mlocked)
		MUST(syscall(__NR_mlock2, region, pmd_size, 1 /* MLOCK_ONFAULT */));
	drain();
	stage_references();
	set_orders(the_case.orders);
	write_number(THP "khugepaged/max_ptes_none", the_case.max_none);
	write_number(THP "khugepaged/max_ptes_swap", the_case.max_swap);
	write_number(THP "khugepaged/max_ptes_shared", the_case.max_shared);
	advise(0, the_case.npages, MADV_HUGEPAGE);
}

/* Running. */

static void scan_once(void)
{
	long before = read_number(THP "khugepaged/full_scans");

	write_text(THP "khugepaged/scan_sleep_millisecs", ASLEEP);
	for (int tries = 0; read_number(THP "khugepaged/full_scans") == before; tries++) {
		if (tries > 20000)
			fail("khugepaged does not come to an end");
		usleep(200);
	}
	usleep(1000);
	if (read_number(THP "khugepaged/full_scans") != before + 1)
		fail("khugepaged scanned more than once");
}

/* Calls: 0 or the error number of each. */

static int failed(long result)
{
	return result == -1 ? errno : 0;
}

static int split(const struct call *call)
{
	char text[128];
	int n = snprintf(text, sizeof(text), "%d,%#lx,%#lx,%d", getpid(), (long)at(call->first),
			 (long)at(call->first + call->count), call->order);

	if (call->at >= 0)
		snprintf(text + n, sizeof(text) - n, ",%d", call->at);
	return try_write(SPLIT_FILE, text) ? errno : 0;
}

/* The pages lie elsewhere from then on, as far into a PMD range as here. */
static int move_away(const struct call *call)
{
	size_t size = call->count * page_size;
	char *place = at(call->first) + 8 * pmd_size;

	return failed((long)mremap(at(call->first), size, size, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, place));
}

static int make(const struct call *call)
{
	const char *name = call->name;
	size_t size = call->count * page_size;
	int end = call->first + call->count, error = 0;

	if (!strcmp(name, "collapse"))
		return failed(madvise(region, pmd_size, MADV_COLLAPSE));
	if (!strcmp(name, "split"))
		return split(call);
	if (!strcmp(name, "cold"))
		return failed(madvise(at(call->first), size, MADV_COLD));
	if (!strcmp(name, "mlock"))
		return failed(mlock(region, pmd_size));
	if (!strcmp(name, "fork"))
		return have_child(keep_all), 0;
	if (!strcmp(name, "pin")) {
		nbuffers = 0;
		add_buffer(call->first, call->count);
		return pin_buffers(), 0;
	}
	for (int i = call->first; i < end && !strcmp(name, "fill"); i++)
		fill(i);
	if (!strcmp(name, "zero"))
		memset(at(call->first), 0, size);
	if (!strcmp(name, "dontneed"))
		error = failed(madvise(at(call->first), size, MADV_DONTNEED));
	if (!strcmp(name, "move"))
		error = move_away(call);
	if (!error)
		memset(the_case.written + call->first, !strcmp(name, "fill"), call->count);
	return error;
}

static int is_intact(void)
{
	char word = 0;
	int intact = 1;

	if (child) {
		if (write(to_child[1], &word, 1) != 1 || read(from_child[0], &word, 1) != 1 || word != 'y')
			intact = 0;
	}
	for (int i = 0; i < the_case.npages; i++) {
		/* A page of userfaultfd that is missing would wait until it is filled; a guard kills. */
		if (is(i, BIT(GUARD)) || (the_case.missing && is(i, ~WRITTEN & ~BIT(ZERO))))
			continue;
		/* What was freed lazily, or may be dropped, may be gone, but nothing else may be there. */
		int may_go = is(i, BIT(LAZYFREE)) || the_case.droppable;
		if (!holds(i, the_case.written[i]) && !(may_go && holds(i, 0)))
			intact = 0;
	}
	return intact;
}

static void run_case(void)
{
	static struct counters before, after;
	char *text = NULL;
	size_t length = 0;
	FILE *out = open_memstream(&text, &length);

	for (int i = 0; i < the_case.npages; i++)
		the_case.written[i] = is(i, WRITTEN);
	stage();
	fprintf(out, "{\"id\":\"%s\",\"page_size\":%zu,\"pmd_order\":%d,\"before\":", the_case.id, page_size, pmd_order);
	look(out);
	fprintf(out, ",\"passes\":[");
	for (int pass = 0; pass < the_case.passes; pass++) {
		int error = 0;

		count(&before);
		write_text(TRACE "trace", "");
		if (the_case.has_calls)
			error = make(&the_case.calls[pass]);
		else if (the_case.forced)
			error = madvise(region, pmd_size, MADV_COLLAPSE) ? errno : 0;
		else
			scan_once();
		count(&after);
		fprintf(out, "%s{\"errno\":%d", pass ? "," : "", error);
		print_trace(out);
		print_counters(out, &before, &after);
		fprintf(out, ",\"look\":");
		look(out);
		fprintf(out, "}");
	}
	fprintf(out, "],\"intact\":%s}\n", is_intact() ? "true" : "false");
	fclose(out);
	for (size_t done = 0; done < length;) {
		ssize_t n = write(out_fd, text + done, length - done);

		if (n <= 0)
			_exit(3);
		done += n;
	}
}

/* The dialogue. */

static void parse_states(char *text)
{
	char *rest = NULL;
	int n = 0;

	for (char *run = strtok_r(text, ",", &rest); run; run = strtok_r(NULL, ",", &rest)) {
		char *colon = strrchr(run, ':'), *slash, *tilde;
		int count = colon ? atoi(colon + 1) : 0, state, order = 0;

		if (!colon || count < 1 || n + count > (1 << pmd_order))
			fail("states do not make a PMD range of %d pages", 1 << pmd_order);
		*colon = 0;
		if ((tilde = strchr(run, '~')))
			*tilde = 0;
		if ((slash = strchr(run, '/'))) {
			*slash = 0;
			order = atoi(slash + 1);
		}
		for (state = 0; state < STATES && strcmp(names[state], run); state++)
			;
		if (state == STATES)
			fail("no state %s", run);
		for (; count--; n++) {
			the_case.state[n] = state;
			the_case.order[n] = order;
			the_case.old[n] = tilde || state == COLD;
		}
	}
	if (n != 1 << pmd_order)
		fail("states for %d pages, not %d", n, 1 << pmd_order);
	the_case.npages = n;
}

static void parse_calls(char *text)
{
	char *rest = NULL;
	int n = 0;

	for (char *word = strtok_r(text, ",", &rest); word && n < MAX_CALLS; word = strtok_r(NULL, ",", &rest), n++) {
		struct call *call = &the_case.calls[n];

		call->at = -1;
		sscanf(word, "%15[a-z]/%d/%d/%d/%d", call->name, &call->first, &call->count, &call->order, &call->at);
	}
	the_case.passes = n;
}

static void parse(char *line)
{
	static char trigger[32], orders[256], vma[128], setup[64], states[MAX_LINE], calls[1024];
	char *rest = NULL;

	memset(&the_case, 0, sizeof(the_case));
	if (sscanf(line, "case %63s %31s %d %255s %d %d %d %127s %63s %1048575s %1023s", the_case.id, trigger,
		   &the_case.passes, orders, &the_case.max_none, &the_case.max_swap, &the_case.max_shared, vma, setup, states,
		   calls) < 10)
		fail("not a case");
	the_case.forced = !strcmp(trigger, "madvise");
	the_case.has_calls = !strcmp(trigger, "calls");
	if (the_case.has_calls)
		parse_calls(calls);
	for (char *order = strtok_r(orders, ",", &rest); order; order = strtok_r(NULL, ",", &rest))
		the_case.orders |= 1ull << atoi(order);
	the_case.wp = !!strstr(vma, "uffd_wp");
	the_case.missing = !!strstr(vma, "uffd_missing");
	the_case.mlocked = !!strstr(vma, "mlocked");
	the_case.droppable = !!strstr(vma, "droppable");
	the_case.forks = strcmp(setup, "no_fork");
	the_case.keeps_all = !!strstr(setup, "keeps_all");
	parse_states(states);
}

static void one_case(char *line)
{
	int status;
	pid_t subject = fork();

	if (!subject) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(CASE_SECONDS);
		parse(line);
		run_case();
		_exit(0);
	}
	waitpid(subject, &status, 0);
	if (WIFSIGNALED(status)) {
		sscanf(line, "case %63s", the_case.id);
		if (!fork())
			fail("the subject died of signal %d", WTERMSIG(status));
		wait(NULL);
	}
}

/* khugepaged starts to scan at once when the first address space is given to it; this one is never left. */
static void occupy_khugepaged(void)
{
	set_orders(1ull << pmd_order);
	write_text(THP "khugepaged/pages_to_scan", "100000000");
	write_text(THP "khugepaged/scan_sleep_millisecs", ASLEEP);
	char *room = mmap(NULL, 2 * pmd_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(room);
	MUST(madvise(room, 2 * pmd_size, MADV_HUGEPAGE));
	/* It may be in the middle of a scan from before: that one has to end, and the next, too. */
	for (int i = 0; i < 3; i++) {
		write_text(THP "khugepaged/scan_sleep_millisecs", ASLEEP);
		usleep(400000);
	}
}

int main(int argc, char **argv)
{
	static char line[MAX_LINE];
	struct termios raw;

	if (argc != 2)
		return 2;
	page_size = sysconf(_SC_PAGESIZE);
	out_fd = open(argv[1], O_RDWR);
	if (out_fd < 0)
		return 2;
	if (!tcgetattr(out_fd, &raw)) {
		cfmakeraw(&raw);
		tcsetattr(out_fd, TCSANOW, &raw);
	}
	strcpy(the_case.id, "hello");
	pmd_size = read_number(THP "hpage_pmd_size");
	if ((long)pmd_size <= 0)
		fail("this kernel has no THP");
	pmd_order = __builtin_ctzl(pmd_size / page_size);
	kpageflags = open("/proc/kpageflags", O_RDONLY);
	kpagecount = open("/proc/kpagecount", O_RDONLY);
	MUST(kpageflags);
	MUST(kpagecount);
	mount("none", "/sys/kernel/debug", "debugfs", 0, NULL);
	try_write("/sys/kernel/mm/lru_gen/enabled", "y");
	try_write("/proc/sys/vm/page-cluster", "0"); /* kernels before 7.0 read ahead what a fork shares */
	write_text(TRACE "events/huge_memory/enable", "1");
	occupy_khugepaged();
	FILE *in = fdopen(dup(out_fd), "r");
	dprintf(out_fd, "{\"id\":\"hello\",\"page_size\":%zu,\"pmd_order\":%d}\n", page_size, pmd_order);
	while (fgets(line, sizeof(line), in) && strncmp(line, "quit", 4))
		one_case(line);
	return 0;
}
