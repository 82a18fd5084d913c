#include "image/holder.h"

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/util.h"

// Whether fd of the process is locked: its fdinfo has a line for each lock.
static bool has_locks(unsigned long pid, const char *fd)
{
    char path[64], line[256];
    bool found = false;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%lu/fdinfo/%.20s", pid, fd);
    file = fopen(path, "re");
    while (file && !found && fgets(line, sizeof(line), file))
        found = !strncmp(line, "lock:", 5);
    if (file)
        fclose(file);
    return found;
}

// By another file descriptor than fd, which is of this process.
static bool has_locked(unsigned long pid, const struct stat *wanted, int fd)
{
    struct dirent *entry;
    struct stat st;
    char path[32];
    bool found = false, is_ours = pid == (unsigned long)getpid();
    char own[16];
    DIR *dir;

    snprintf(own, sizeof(own), "%d", fd);
    snprintf(path, sizeof(path), "/proc/%lu/fd", pid);
    dir = opendir(path);
    while (dir && !found && (entry = readdir(dir)))
        found = !(is_ours && !strcmp(entry->d_name, own)) && !fstatat(dirfd(dir), entry->d_name, &st, 0) &&
                st.st_dev == wanted->st_dev && st.st_ino == wanted->st_ino && has_locks(pid, entry->d_name);
    if (dir)
        closedir(dir);
    return found;
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
    struct dirent *entry;
    struct stat wanted;
    unsigned long pid;
    bool found = false;
    DIR *dir = fstat(fd, &wanted) < 0 ? NULL : opendir("/proc");

    snprintf(text, text_bytes, "somebody");
    while (dir && !found && (entry = readdir(dir))) {
        // Neither we nor our supervisor.
        if (util_parse_uint(entry->d_name, 1, INT32_MAX, &pid) < 0 || pid == (unsigned long)getpid() ||
            pid == (unsigned long)getppid())
            continue;
        found = has_locked(pid, &wanted, fd);
        if (found)
            name_process(pid, text, text_bytes);
    }
    if (dir)
        closedir(dir);
    if (!found && has_locked((unsigned long)getpid(), &wanted, fd))
        snprintf(text, text_bytes, "this bight, as another image,");
}
