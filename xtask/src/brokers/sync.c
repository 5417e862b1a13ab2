/* Stands before the system's: a sync takes a known time, and makes nothing durable. */
#include <time.h>

int fdatasync(int file)
{
    struct timespec left = { 0, SYNC_NANOS };
    (void)file;
    while (SYNC_NANOS > 0 && nanosleep(&left, &left) != 0) {
    }
    return 0;
}

int fsync(int file)
{
    (void)file;
    return 0;
}
