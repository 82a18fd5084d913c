// Constants of the NBD protocol. Sections named here and in this folder are those of doc/proto.md of
// github.com/NetworkBlockDevice/nbd. All numbers on the wire are big-endian.
#pragma once

// "Newstyle negotiation"
#define NBD_MAGIC 0x4e42444d41474943ULL        // "NBDMAGIC"
#define NBD_OPT_MAGIC 0x49484156454f5054ULL    // "IHAVEOPT"
#define NBD_OPT_REPLY_MAGIC 0x3e889045565a9ULL // "Fixed newstyle negotiation"
#define NBD_MAX_STRING_BYTES 4096              // "Conventions"

enum {
    NBD_FLAG_FIXED_NEWSTYLE = 1 << 0, // the same bits from server and client
    NBD_FLAG_NO_ZEROES = 1 << 1,
};

// "Option types"
enum {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_LIST_META_CONTEXT = 9,
    NBD_OPT_SET_META_CONTEXT = 10,
    NBD_OPT_EXTENDED_HEADERS = 11,
};

// "Option reply types"
#define NBD_REP_ERR(n) (0x80000000U | (n))
enum {
    NBD_REP_ACK = 1,
    NBD_REP_SERVER = 2,
    NBD_REP_INFO = 3,
    NBD_REP_META_CONTEXT = 4,
};
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR(10)

enum {
    NBD_INFO_EXPORT = 0,
    NBD_INFO_NAME = 1,
    NBD_INFO_DESCRIPTION = 2,
    NBD_INFO_BLOCK_SIZE = 3,
};

// "Transmission flags"
enum {
    NBD_FLAG_HAS_FLAGS = 1 << 0,
    NBD_FLAG_READ_ONLY = 1 << 1,
    NBD_FLAG_SEND_FLUSH = 1 << 2,
    NBD_FLAG_SEND_FUA = 1 << 3,
    NBD_FLAG_SEND_TRIM = 1 << 5,
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
    NBD_FLAG_SEND_DF = 1 << 7,
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
    NBD_FLAG_SEND_CACHE = 1 << 10,
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
};

// "Request message": magic32 flags16 type16 cookie64 offset64 length32, or length64 when extended
// headers were negotiated.
#define NBD_REQUEST_MAGIC 0x25609513U
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71U
#define NBD_REQUEST_BYTES 28
#define NBD_EXTENDED_REQUEST_BYTES 32

enum {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
};

enum {
    NBD_CMD_FLAG_FUA = 1 << 0,
    NBD_CMD_FLAG_NO_HOLE = 1 << 1,
    NBD_CMD_FLAG_DF = 1 << 2,
    NBD_CMD_FLAG_REQ_ONE = 1 << 3,
    NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
    NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5,
};

// "Simple reply message": magic32 error32 cookie64
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698U
#define NBD_SIMPLE_REPLY_BYTES 16
// "Structured reply chunk message": magic32 flags16 type16 cookie64 length32
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efU
#define NBD_STRUCTURED_REPLY_BYTES 20
// Extended: magic32 flags16 type16 cookie64 offset64 length64
#define NBD_EXTENDED_REPLY_MAGIC 0x6e8a278cU
#define NBD_EXTENDED_REPLY_BYTES 32

#define NBD_REPLY_FLAG_DONE 1
enum {
    NBD_REPLY_TYPE_NONE = 0,
    NBD_REPLY_TYPE_OFFSET_DATA = 1,
    NBD_REPLY_TYPE_OFFSET_HOLE = 2,
    NBD_REPLY_TYPE_BLOCK_STATUS = 5,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
    NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,
};

// "Metadata querying": base:allocation
#define NBD_CONTEXT_BASE_ALLOCATION "base:allocation"
#define NBD_CONTEXT_ID 1
enum {
    NBD_STATE_HOLE = 1 << 0,
    NBD_STATE_ZERO = 1 << 1,
};

// "Error values"
enum {
    NBD_EPERM = 1,
    NBD_EIO = 5,
    NBD_ENOMEM = 12,
    NBD_EINVAL = 22,
    NBD_ENOSPC = 28,
    NBD_EOVERFLOW = 75,
    NBD_ENOTSUP = 95,
};
