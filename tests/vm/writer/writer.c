/* What a guest runs to find out whether its disks forget or fail.
 *
 *     writer NAME=DEVICE...        until a line comes on standard input
 *
 * Two threads per disk, each in its own half, write records of 1 to 16 blocks of 4 KiB past the
 * guest's page cache (O_DIRECT), read others back and now and then fdatasync. A block holds its own
 * address, the number of the write, and words that follow from both. What a block held before the
 * first write is remembered too, by its digest, so that a base that changes is seen.
 *
 * Prints `STRATO key=value` lines, which tests/support/writer.py reads:
 *     begun                        when all devices have been read once
 *     tick    NAME.THREAD:rounds ...  every 200 ms
 *     slow    NAME operation ms    an operation of 50 ms or more, when it is over
 *     fault   NAME kind ...        the first faults, for people
 *     result-NAME                  at the end, after all was read again
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 4096,
    BLOCK_WORDS = BLOCK_BYTES / 8,
    RECORD_BLOCKS_MAX = 16,
    THREADS_PER_DISK = 2,
    DISKS_MAX = 4,
    SLOWEST_KEPT = 5,
    FAULTS_PRINTED_MAX = 20,
    TICK_MS = 200,
    SLOW_MS = 50,
};

static const uint64_t MAGIC = 0x5354524154574954;

struct disk {
    const char *name;
    int descriptor;
    uint64_t blocks;
    uint64_t *expected; /* digest of what each block must hold; 0 after a failed write */
    pthread_mutex_t lock;
    long acknowledged, synced, read, errors, lost, wrong, slow;
    double slowest_ms[SLOWEST_KEPT];
};

struct worker {
    struct disk *disk;
    uint64_t first, blocks, number;
    volatile long rounds;
    unsigned seed;
    pthread_t thread;
    unsigned char *record;
};

static struct disk disks[DISKS_MAX];
static struct worker workers[DISKS_MAX * THREADS_PER_DISK];
static int disk_count;
static volatile int stopping;
static pthread_mutex_t console = PTHREAD_MUTEX_INITIALIZER;

static void say(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    pthread_mutex_lock(&console);
    fputs("STRATO ", stdout);
    vprintf(format, arguments);
    putchar('\n');
    fflush(stdout);
    pthread_mutex_unlock(&console);
    va_end(arguments);
}

static void die(const char *what)
{
    say("failed=%s: %s", what, strerror(errno));
    exit(1);
}

static double now_ms(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 33) * 0xff51afd7ed558ccdULL;
    value = (value ^ value >> 33) * 0xc4ceb9fe1a85ec53ULL;
    return value ^ value >> 33;
}

static uint64_t digest(const void *block)
{
    const uint64_t *words = block;
    uint64_t sum = 1;

    for (int i = 0; i < BLOCK_WORDS; i++)
        sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15ULL + (sum >> 29);
    return sum ? sum : 1;
}

static void compose(void *block, uint64_t address, uint64_t number)
{
    uint64_t *words = block, state = mix(address << 32 ^ number);

    words[0] = MAGIC;
    words[1] = address;
    words[2] = number;
    for (int i = 3; i < BLOCK_WORDS; i++)
        words[i] = state += 0x9e3779b97f4a7c15ULL;
}

/* Whether a block is some whole record of its address: then what should be here was lost. */
static int is_record(const void *block, uint64_t address)
{
    const uint64_t *words = block;
    uint64_t whole[BLOCK_WORDS];

    if (words[0] != MAGIC || words[1] != address)
        return 0;
    compose(whole, address, words[2]);
    return memcmp(whole, block, BLOCK_BYTES) == 0;
}

static void count_time(struct disk *disk, const char *operation, double since_ms)
{
    double took_ms = now_ms() - since_ms;

    if (took_ms < SLOW_MS)
        return;
    pthread_mutex_lock(&disk->lock);
    disk->slow++;
    for (int i = 0; i < SLOWEST_KEPT; i++)
        if (took_ms > disk->slowest_ms[i]) {
            memmove(disk->slowest_ms + i + 1, disk->slowest_ms + i,
                    (SLOWEST_KEPT - i - 1) * sizeof(double));
            disk->slowest_ms[i] = took_ms;
            break;
        }
    pthread_mutex_unlock(&disk->lock);
    say("slow=%s %s %.0f", disk->name, operation, took_ms);
}

static void count_fault(struct disk *disk, long *counter, const char *kind, uint64_t block,
                        const char *detail)
{
    pthread_mutex_lock(&disk->lock);
    int print = ++*counter <= FAULTS_PRINTED_MAX;
    pthread_mutex_unlock(&disk->lock);
    if (print)
        say("fault=%s %s block %lu %s", disk->name, kind, (unsigned long)block, detail);
}

static void count(struct disk *disk, long *counter)
{
    pthread_mutex_lock(&disk->lock);
    ++*counter;
    pthread_mutex_unlock(&disk->lock);
}

static int transfer(struct disk *disk, int writing, void *buffer, uint64_t block, int blocks)
{
    size_t length = (size_t)blocks * BLOCK_BYTES;
    off_t offset = block * BLOCK_BYTES;
    const char *operation = writing ? "write" : "read";
    double since_ms = now_ms();
    ssize_t done = writing ? pwrite(disk->descriptor, buffer, length, offset)
                           : pread(disk->descriptor, buffer, length, offset);

    if (done != (ssize_t)length)
        count_fault(disk, &disk->errors, operation, block,
                    done < 0 ? strerror(errno) : "was cut short");
    count_time(disk, operation, since_ms);
    return done == (ssize_t)length;
}

static void check(struct disk *disk, unsigned char *buffer, uint64_t first, int blocks)
{
    if (!transfer(disk, 0, buffer, first, blocks))
        return;
    count(disk, &disk->read);
    for (int i = 0; i < blocks; i++) {
        const unsigned char *block = buffer + (size_t)i * BLOCK_BYTES;
        uint64_t address = first + i;

        if (!disk->expected[address] || digest(block) == disk->expected[address])
            continue;
        if (is_record(block, address))
            count_fault(disk, &disk->lost, "lost", address, "holds an older record");
        else
            count_fault(disk, &disk->wrong, "wrong", address, "holds no record of its own");
    }
}

static void write_record(struct worker *worker, uint64_t first, int blocks)
{
    struct disk *disk = worker->disk;

    worker->number += THREADS_PER_DISK;
    for (int i = 0; i < blocks; i++)
        compose(worker->record + (size_t)i * BLOCK_BYTES, first + i, worker->number);
    int written = transfer(disk, 1, worker->record, first, blocks);
    for (int i = 0; i < blocks; i++)
        disk->expected[first + i] =
            written ? digest(worker->record + (size_t)i * BLOCK_BYTES) : 0;
    if (written)
        count(disk, &disk->acknowledged);
}

static void sync_disk(struct disk *disk)
{
    double since_ms = now_ms();

    if (fdatasync(disk->descriptor))
        count_fault(disk, &disk->errors, "fdatasync", 0, strerror(errno));
    else
        count(disk, &disk->synced);
    count_time(disk, "fdatasync", since_ms);
}

static void *work(void *argument)
{
    struct worker *worker = argument;

    while (!stopping) {
        int blocks = 1 << rand_r(&worker->seed) % 5;
        uint64_t first = worker->first + rand_r(&worker->seed) % (worker->blocks - blocks);

        write_record(worker, first, blocks);
        if (rand_r(&worker->seed) % 8 == 0)
            sync_disk(worker->disk);
        if (rand_r(&worker->seed) % 2 == 0) {
            blocks = 1 << rand_r(&worker->seed) % 5;
            first = worker->first + rand_r(&worker->seed) % (worker->blocks - blocks);
            check(worker->disk, worker->record, first, blocks);
        }
        worker->rounds++;
    }
    return NULL;
}

static unsigned char *buffer_for_record(void)
{
    void *buffer;

    if (posix_memalign(&buffer, BLOCK_BYTES, RECORD_BLOCKS_MAX * BLOCK_BYTES))
        die("memory");
    return buffer;
}

static void open_disk(struct disk *disk, char *argument)
{
    char *path = strchr(argument, '=');
    uint64_t size_bytes;

    if (!path)
        die("argument");
    *path++ = 0;
    disk->name = argument;
    disk->descriptor = open(path, O_RDWR | O_DIRECT);
    if (disk->descriptor < 0 || ioctl(disk->descriptor, BLKGETSIZE64, &size_bytes))
        die(path);
    disk->blocks = size_bytes / (BLOCK_BYTES * RECORD_BLOCKS_MAX) * RECORD_BLOCKS_MAX;
    disk->expected = calloc(disk->blocks, sizeof(uint64_t));
    pthread_mutex_init(&disk->lock, NULL);
}

static void for_all_records(struct disk *disk, unsigned char *buffer, int remembering)
{
    for (uint64_t first = 0; first < disk->blocks; first += RECORD_BLOCKS_MAX) {
        if (!remembering) {
            check(disk, buffer, first, RECORD_BLOCKS_MAX);
        } else if (transfer(disk, 0, buffer, first, RECORD_BLOCKS_MAX)) {
            for (int i = 0; i < RECORD_BLOCKS_MAX; i++)
                disk->expected[first + i] = digest(buffer + (size_t)i * BLOCK_BYTES);
        }
    }
}

static void tick_until_told(void)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};

    while (!poll(&input, 1, TICK_MS)) {
        char line[256];
        int length = 0;

        for (int i = 0; i < disk_count * THREADS_PER_DISK; i++)
            length += snprintf(line + length, sizeof line - length, "%s%s.%d:%ld", i ? " " : "",
                               workers[i].disk->name, i % THREADS_PER_DISK, workers[i].rounds);
        say("tick=%s", line);
    }
}

static void report(const struct disk *disk)
{
    say("result-%s=acknowledged:%ld synced:%ld read:%ld errors:%ld lost:%ld wrong:%ld slow:%ld "
        "slowest_ms:%.0f,%.0f,%.0f,%.0f,%.0f",
        disk->name, disk->acknowledged, disk->synced, disk->read, disk->errors, disk->lost,
        disk->wrong, disk->slow, disk->slowest_ms[0], disk->slowest_ms[1], disk->slowest_ms[2],
        disk->slowest_ms[3], disk->slowest_ms[4]);
}

int main(int argc, char **argv)
{
    unsigned char *buffer = buffer_for_record();

    if (argc < 2 || argc > DISKS_MAX + 1)
        die("arguments");
    disk_count = argc - 1;
    for (int i = 0; i < disk_count; i++) {
        open_disk(disks + i, argv[i + 1]);
        for_all_records(disks + i, buffer, 1);
    }
    say("begun=%d", disk_count);
    for (int i = 0; i < disk_count * THREADS_PER_DISK; i++) {
        struct worker *worker = workers + i;

        worker->disk = disks + i / THREADS_PER_DISK;
        worker->blocks = worker->disk->blocks / THREADS_PER_DISK;
        worker->first = i % THREADS_PER_DISK * worker->blocks;
        worker->number = i % THREADS_PER_DISK;
        worker->seed = i + 1;
        worker->record = buffer_for_record();
        if (pthread_create(&worker->thread, NULL, work, worker))
            die("thread");
    }
    tick_until_told();
    stopping = 1;
    for (int i = 0; i < disk_count * THREADS_PER_DISK; i++)
        pthread_join(workers[i].thread, NULL);
    for (int i = 0; i < disk_count; i++) {
        for_all_records(disks + i, buffer, 0);
        report(disks + i);
    }
    return 0;
}
