/* A target that waits for its child in vfork(2), uninterruptibly, and has a second thread that counts.
 *
 * mover_vfork FILE
 *
 * FILE is mapped shared: stop, ready, counter. The child ends when stop is set, and with it the waiting.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t *control;

static void *count(void *argument)
{
    for (;;) {
        struct timespec time = {0, 100000};
        nanosleep(&time, NULL);
        control[2]++;
    }
    return argument;
}

int main(int words_count, char **words)
{
    pthread_t thread;
    if (words_count != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, 9);
    int fd = open(words[1], O_RDWR);
    control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    pthread_create(&thread, NULL, count, NULL);
    if (vfork() == 0) {
        control[1] = 1;
        while (!control[0]) {
            struct timespec time = {0, 1000000};
            nanosleep(&time, NULL);
        }
        _exit(0);
    }
    control[1] = 2;
    for (;;)
        pause();
}
