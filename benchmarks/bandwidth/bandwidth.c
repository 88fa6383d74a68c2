/* How fast this machine's memory can be read: the ceiling that every decode speed is held against.
 *
 * It shares no code with any engine, so that it can contradict all of them.  A buffer far larger than the caches, on
 * huge pages where the kernel gives them, is summed in lines of 64 bytes by one thread, then by two.  Each thread
 * reads a slice of its own, as several equally long runs at once: one run alone can leave a core waiting on its
 * prefetcher, so the number of runs is measured rather than chosen.  Prints one JSON document; figures in GB/s (1e9).
 *
 *     bandwidth [MiB] [repeats]
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t Line __attribute__((vector_size(64)));

enum { MAX_THREADS = 2, MAX_RUNS = 4, MAX_REPEATS = 100, HUGE_PAGE = 2 << 20 };

typedef struct {
  const Line* lines;
  size_t count; /* lines in this thread's slice, a multiple of four times the runs */
  int runs;
  pthread_barrier_t* gate;
  double start, end;
  uint64_t sum; /* kept, so that the reading cannot be optimised away */
} Reader;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Lines left out at the end of each run: runs a power of two apart would fight over the same few cache sets. */
enum { SKEW = 68 };

static size_t run_length(size_t count, int runs) { return count / (size_t)runs - SKEW; }

/* One body for every number of runs; inlined with a constant, so each gets its own unrolled loop. */
static inline __attribute__((always_inline)) Line sum_lines(const Line* lines, size_t count, const int runs) {
  Line sums[MAX_RUNS * 4] = {{0}};
  const size_t run = run_length(count, runs);
  for (size_t i = 0; i < run; i += 4)
    for (int r = 0; r < runs; r++)
      for (int k = 0; k < 4; k++) sums[r * 4 + k] += lines[(size_t)r * run + i + (size_t)k];
  Line total = {0};
  for (int k = 0; k < runs * 4; k++) total += sums[k];
  return total;
}

static void* read_slice(void* argument) {
  Reader* reader = argument;
  pthread_barrier_wait(reader->gate);
  reader->start = now();
  Line total;
  switch (reader->runs) {
    case 1: total = sum_lines(reader->lines, reader->count, 1); break;
    case 2: total = sum_lines(reader->lines, reader->count, 2); break;
    default: total = sum_lines(reader->lines, reader->count, 4); break;
  }
  for (int k = 0; k < 8; k++) reader->sum += total[k];
  reader->end = now();
  return NULL;
}

/* Reads the whole buffer once with this many threads; GB/s from the first start to the last end. */
static double read_once(const Line* lines, size_t count, int threads, int runs, uint64_t* sum) {
  pthread_t handles[MAX_THREADS];
  Reader readers[MAX_THREADS];
  pthread_barrier_t gate;
  pthread_barrier_init(&gate, NULL, (unsigned)threads);
  const size_t slice = count / (size_t)threads;
  for (int t = 0; t < threads; t++) {
    readers[t] =
        (Reader){.lines = lines + (size_t)t * run_length(slice, 1), .count = slice, .runs = runs, .gate = &gate};
    if (pthread_create(&handles[t], NULL, read_slice, &readers[t]) != 0) exit(3);
  }
  double start = 1e300, end = 0;
  for (int t = 0; t < threads; t++) {
    pthread_join(handles[t], NULL);
    if (readers[t].start < start) start = readers[t].start;
    if (readers[t].end > end) end = readers[t].end;
    *sum += readers[t].sum;
  }
  pthread_barrier_destroy(&gate);
  const size_t read = run_length(slice, runs) * (size_t)(runs * threads);
  return (double)(read * sizeof(Line)) / (end - start) / 1e9;
}

static int ascending(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static void report(const Line* lines, size_t count, int threads, int runs, int repeats, uint64_t* sum) {
  double rates[MAX_REPEATS];
  for (int i = 0; i < repeats; i++) rates[i] = read_once(lines, count, threads, runs, sum);
  qsort(rates, (size_t)repeats, sizeof rates[0], ascending);
  const double median = 0.5 * (rates[(repeats - 1) / 2] + rates[repeats / 2]);
  printf("{\"threads\": %d, \"runs_per_thread\": %d, \"median\": %.2f, \"min\": %.2f, \"max\": %.2f}", threads, runs,
         median, rates[0], rates[repeats - 1]);
}

static long argument(int argc, char** argv, int index, long otherwise, long most) {
  if (index >= argc) return otherwise;
  char* rest;
  const long value = strtol(argv[index], &rest, 10);
  if (*rest != '\0' || value < 1 || value > most) {
    fprintf(stderr, "usage: %s [MiB] [repeats, at most %d]\n", argv[0], MAX_REPEATS);
    exit(2);
  }
  return value;
}

int main(int argc, char** argv) {
  const size_t bytes = (size_t)argument(argc, argv, 1, 1024, 1 << 20) << 20;
  const int repeats = (int)argument(argc, argv, 2, 9, MAX_REPEATS);
  Line* lines = aligned_alloc(HUGE_PAGE, bytes + (-bytes & (HUGE_PAGE - 1)));
  if (lines == NULL) {
    fprintf(stderr, "no memory for a buffer of %zu bytes\n", bytes);
    return 3;
  }
  const int huge = madvise(lines, bytes, MADV_HUGEPAGE) == 0;
  memset(lines, 1, bytes);
  const size_t count = bytes / sizeof(Line);
  uint64_t sum = 0;
  static const int runs[] = {1, 2, 4};
  printf("{\"buffer_bytes\": %zu, \"huge_pages\": %s, \"repeats\": %d, \"gigabytes_per_second\": [", bytes,
         huge ? "true" : "false", repeats);
  for (int threads = 1; threads <= MAX_THREADS; threads++)
    for (int i = 0; i < 3; i++) {
      if (threads > 1 || i > 0) printf(", ");
      report(lines, count, threads, runs[i], repeats, &sum);
    }
  printf("], \"sum\": %llu}\n", (unsigned long long)sum);
  free(lines);
  return 0;
}
