#include "image/holder.h"

#include <dirent.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/util.h"

enum held { HELD_NOT, HELD_SOMEHOW, HELD_FOR_WRITING };

// A line of fdinfo, which is taken apart: "lock: ... FIRST LAST", of which LAST may be EOF.
static enum held lock_of(char *line)
{
    char *last = strrchr(line, ' '), *first;
    unsigned long n;

    if (strncmp(line, "lock:", 5) || !last)
        return HELD_NOT;
    *last++ = '\0';
    last[strcspn(last, "\n")] = '\0';
    first = strrchr(line, ' ');
    return first && !util_parse_uint(first + 1, 0, HOLDER_WRITE_BYTE, &n) &&
                   !util_parse_uint(last, HOLDER_WRITE_BYTE, ULONG_MAX, &n)
               ? HELD_FOR_WRITING
               : HELD_SOMEHOW;
}

// How fd of the process is locked.
static enum held locks_of(unsigned long pid, const char *fd)
{
    enum held held = HELD_NOT, next;
    char path[64], line[256];
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%lu/fdinfo/%.20s", pid, fd);
    file = fopen(path, "re");
    while (file && held < HELD_FOR_WRITING && fgets(line, sizeof(line), file)) {
        next = lock_of(line);
        held = max_of(held, next);
    }
    if (file)
        fclose(file);
    return held;
}

// By another file descriptor than fd, which is of this process.
static enum held held_by(unsigned long pid, const struct stat *wanted, int fd)
{
    enum held held = HELD_NOT, next;
    struct dirent *entry;
    struct stat st;
    char path[32];
    bool is_ours = pid == (unsigned long)getpid();
    char own[16];
    DIR *dir;

    snprintf(own, sizeof(own), "%d", fd);
    snprintf(path, sizeof(path), "/proc/%lu/fd", pid);
    dir = opendir(path);
    while (dir && held < HELD_FOR_WRITING && (entry = readdir(dir))) {
        if ((is_ours && !strcmp(entry->d_name, own)) || fstatat(dirfd(dir), entry->d_name, &st, 0) < 0 ||
            st.st_dev != wanted->st_dev || st.st_ino != wanted->st_ino)
            continue;
        next = locks_of(pid, entry->d_name);
        held = max_of(held, next);
    }
    if (dir)
        closedir(dir);
    return held;
}

static void name_process(unsigned long pid, char *text, size_t text_bytes)
{
    char path[32], comm[32] = "";
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%lu/comm", pid);
    file = fopen(path, "re");
    if (file && fgets(comm, sizeof(comm), file))
        comm[strcspn(comm, "\n")] = '\0';
    if (file)
        fclose(file);
    snprintf(text, text_bytes, "%s (process %lu)", comm, pid);
}

void image_holder(int fd, char *text, size_t text_bytes)
{
    enum held best = HELD_NOT, held;
    struct dirent *entry;
    struct stat wanted;
    unsigned long pid;
    DIR *dir = fstat(fd, &wanted) < 0 ? NULL : opendir("/proc");

    snprintf(text, text_bytes, "somebody");
    while (dir && best < HELD_FOR_WRITING && (entry = readdir(dir))) {
        // Neither we nor our supervisor.
        if (util_parse_uint(entry->d_name, 1, INT32_MAX, &pid) < 0 || pid == (unsigned long)getpid() ||
            pid == (unsigned long)getppid())
            continue;
        held = held_by(pid, &wanted, fd);
        if (held <= best)
            continue;
        best = held;
        name_process(pid, text, text_bytes);
    }
    if (dir)
        closedir(dir);
    if (!best && held_by((unsigned long)getpid(), &wanted, fd))
        snprintf(text, text_bytes, "this bight, as another image,");
}
