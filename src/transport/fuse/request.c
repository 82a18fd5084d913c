// Reading the kernel's messages: pure, hot. Structures are those of linux/fuse.h.

#include "transport/fuse/request.h"

#include <errno.h>
#include <string.h>

#include "transport/fuse/proto.h"

// The arguments as ARG, on a copy; false: they are too short.
#define TAKE(arg) (args_bytes >= sizeof(arg) && memcpy(&(arg), args, sizeof(arg)))

static int parse_args(const void *args, size_t args_bytes, size_t data_bytes, struct fuse_request *request)
{
    switch (request->opcode) {
    case FUSE_READ: {
        struct fuse_read_in in;

        if (!TAKE(in))
            return -EINVAL;
        request->offset_bytes = in.offset;
        request->len_bytes = in.size;
        return 0;
    }
    case FUSE_WRITE: {
        struct fuse_write_in in;

        if (!TAKE(in) || in.size != data_bytes)
            return -EINVAL;
        request->offset_bytes = in.offset;
        request->len_bytes = in.size;
        request->flags = in.flags;
        return 0;
    }
    case FUSE_OPEN: {
        struct fuse_open_in in;

        if (!TAKE(in))
            return -EINVAL;
        request->flags = in.flags;
        return 0;
    }
    case FUSE_SETATTR: {
        struct fuse_setattr_in in;

        if (!TAKE(in))
            return -EINVAL;
        request->flags = in.valid;
        request->len_bytes = in.size;
        return 0;
    }
    case FUSE_FALLOCATE: {
        struct fuse_fallocate_in in;

        if (!TAKE(in))
            return -EINVAL;
        request->offset_bytes = in.offset;
        request->len_bytes = in.length;
        request->flags = in.mode;
        return 0;
    }
    case FUSE_LSEEK: {
        struct fuse_lseek_in in;

        if (!TAKE(in))
            return -EINVAL;
        request->offset_bytes = in.offset;
        request->flags = in.whence;
        return 0;
    }
    default:
        return 0;
    }
}

void fuse_request_parse(const struct fuse_in_header *header, const void *args, size_t args_bytes,
                        size_t data_bytes, struct fuse_request *request)
{
    *request = (struct fuse_request){.opcode = header->opcode, .unique = header->unique};
    request->error = parse_args(args, args_bytes, data_bytes, request);
    if (request->offset_bytes > INT64_MAX)
        request->error = -EINVAL;
}
