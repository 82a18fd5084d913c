// The backing image: a regular file or a block device, opened, locked and measured.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "util/log.h"

struct image_options {
    bool is_read_only;
    bool want_direct;   // O_DIRECT, where the file system can
    bool is_format_raw; // said by the user: what the first bytes look like does not matter
    bool is_open;       // as fd: by the process that we have it from, and locked
    int fd;
    uint64_t offset_bytes;
    uint64_t size_limit_bytes; // 0: none
};

// What may change while it is in use is in image_take().
struct image {
    char *path;
    int fd;          // the one struct file that I/O goes through
    int buffered_fd; // direct only: for the last, partial block of a file; -1 otherwise
    bool is_read_only;
    bool is_direct;
    bool is_sync; // fd has O_SYNC or O_DSYNC: no volatile cache
    bool is_block_device;
    bool is_passed;            // the kernel has the file as well, and its locks are to last as long
    bool can_discard;          // space can be given back, below a writable image
    uint64_t offset_bytes;     // where the device begins in the image
    uint64_t size_bytes;       // of the device: what lies between the offset and the limit or the end
    uint64_t file_bytes;       // of the whole image
    uint32_t dio_offset_align; // direct: offsets and lengths; a power of two; 1 when buffered
    uint32_t dio_mem_align;    // direct: memory; 1 when buffered
    uint32_t sector_bytes;     // what it is punched by, but for a direct file without fastfs: 1
};

// 0, or a negative errno with err set. Takes the image's locks.
int image_open(struct image *image, const char *path, const struct image_options *options, struct err *err);
void image_close(struct image *image);

// Asks XFS to allocate in pieces of that size (FS_IOC_FSSETXATTR): only a file without blocks takes that.
// 0 or a negative errno with err set.
int image_set_extent_size_hint(const struct image *image, uint64_t bytes, struct err *err);

// Looks at the image's size again: next is the image as it is now, with the same file descriptors and path
// but for buffered_fd, which may be a new one. 0 or a negative errno with err set.
int image_remeasure(struct image *next, const struct image *image, const struct image_options *options,
                    struct err *err);

// image becomes next, which was made of it. Path, file descriptor and offset are the same, and are not
// touched: a map's thread may be reading them.
void image_take(struct image *image, const struct image *next);

// The same for O_DIRECT on or off; -EINVAL where the file system cannot.
int image_set_direct(struct image *next, const struct image *image, bool is_direct, struct err *err);

// What the first len bytes look like: the name of a disk image format, or NULL.
const char *image_looks_like(const void *head, unsigned len_bytes);

// The byte-range locks that QEMU takes on images (block/file-posix.c: bytes 100+ are permissions in
// use, bytes 200+ permissions not shared), by OFD locks: they go when fd is closed.
// Takes those, and gives up others that fd had. -EAGAIN: somebody else has it, and still had it after a
// short wait; nothing is locked then.
int image_lock(int fd, bool is_read_only);
void image_unlock(int fd);
