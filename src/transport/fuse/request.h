// A message of the kernel, read and checked.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct fuse_in_header;

struct fuse_request {
    uint32_t opcode;
    uint64_t unique;
    uint64_t offset_bytes; // READ, WRITE, FALLOCATE, LSEEK
    uint64_t len_bytes;    // READ, WRITE, FALLOCATE; SETATTR: the size
    uint32_t flags;        // OPEN, WRITE: of the open file; FALLOCATE: mode; LSEEK: whence; SETATTR: FATTR_*
    int error;             // what it has to be answered, 0 or a negative errno
};

// args: the operation's own part; a WRITE has data_bytes of data behind it, elsewhere. The header is whole;
// its len is the caller's to check. Pure, hot.
void fuse_request_parse(const struct fuse_in_header *header, const void *args, size_t args_bytes,
                        size_t data_bytes, struct fuse_request *request);
