// Who has a block device or a file, for people who would take it away. Cold.
#pragma once

#include <stdbool.h>
#include <stddef.h>

// Who has the device or one of its partitions: where it is mounted, what is stacked on it, which
// processes have it open ("mounted on /mnt, opened by mkfs (1234)"). false: nobody that can be seen, and
// text is empty. Who is not root does not see other users' processes.
bool holders_of_device(const char *device, char *text, size_t text_bytes);

// Which processes have the file at the absolute path open, in the same words. The file itself is not touched.
bool holders_of_file(const char *path, char *text, size_t text_bytes);
