// Writes valid inputs for the fuzz targets to begin with: seeds CORPUS STAMP makes CORPUS/fuzz_NAME/NUMBER.

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "../unit/wire.h"
#include "transport/vhost_user/proto.h"
#include "util/util.h"

static const char *corpus;
static unsigned nr_seeds;
static bool is_failed;

static void write_file(const char *path, const void *data, size_t len)
{
    FILE *file = fopen(path, "w");

    if (!file || fwrite(data, 1, len, file) != len || fclose(file)) {
        perror(path);
        is_failed = true;
    }
}

static void seed(const char *target, const void *data, size_t len)
{
    char path[4096];

    snprintf(path, sizeof(path), "%s/fuzz_%s", corpus, target);
    if (mkdir(path, 0777) < 0 && errno != EEXIST)
        is_failed = true;
    snprintf(path, sizeof(path), "%s/fuzz_%s/seed-%u", corpus, target, nr_seeds++);
    write_file(path, data, len);
}

static void seed_text(const char *target, const char *text)
{
    seed(target, text, strlen(text));
}

static void seed_handshakes(void)
{
    static const uint16_t infos[] = {NBD_INFO_NAME, NBD_INFO_BLOCK_SIZE};
    struct wire wire = {0};

    for (uint8_t piece = 0; piece < 40; piece += 13) {
        wire.len = 0;
        wire_put(&wire, &piece, 1);
        wire_client_flags(&wire, 3);
        wire_option(&wire, NBD_OPT_LIST, NULL, 0);
        wire_option(&wire, NBD_OPT_STARTTLS, NULL, 0);
        wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        wire_meta_context(&wire, NBD_OPT_LIST_META_CONTEXT, "a", "base:");
        wire_meta_context(&wire, NBD_OPT_SET_META_CONTEXT, "second", "base:allocation");
        wire_option(&wire, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
        wire_go(&wire, NBD_OPT_INFO, "a", infos, ARRAY_SIZE(infos));
        wire_go(&wire, NBD_OPT_GO, "second", NULL, 0);
        seed("handshake", wire.bytes, wire.len);
    }
    wire.len = 1;
    wire_client_flags(&wire, 1);
    wire_option(&wire, NBD_OPT_EXPORT_NAME, "second", 6);
    seed("handshake", wire.bytes, wire.len);
    wire.len = 1;
    wire_client_flags(&wire, 3);
    wire_option_head(&wire, NBD_OPT_INFO, 70000);
    wire_option(&wire, NBD_OPT_ABORT, NULL, 0);
    seed("handshake", wire.bytes, wire.len);
    wire_free(&wire);
}

static void put_write(struct wire *wire, bool is_extended, unsigned flags, uint64_t offset, uint32_t len)
{
    wire_request(wire, is_extended, NBD_CMD_WRITE, flags | (is_extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0), 0,
                 offset, len);
    memset(wire_grow(wire, len), 'w', len);
}

static void seed_streams(void)
{
    struct wire wire = {0};

    for (unsigned choice = 0; choice < 256; choice += 13) {
        bool is_extended = (choice & 3) == 2;
        uint8_t first = (uint8_t)choice;

        wire.len = 0;
        wire_put(&wire, &first, 1);
        put_write(&wire, is_extended, 0, 1000, 600);
        wire_request(&wire, is_extended, NBD_CMD_READ, 0, 0, 0, 65536);
        wire_request(&wire, is_extended, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, 512, 3000);
        wire_request(&wire, is_extended, NBD_CMD_TRIM, 0, 0, 4096, 8192);
        wire_request(&wire, is_extended, NBD_CMD_FLUSH, 0, 0, 0, 0);
        wire_request(&wire, is_extended, NBD_CMD_CACHE, 0, 0, 0, 4096);
        if (choice & 8)
            wire_request(&wire, is_extended, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 0, 0, 66000);
        if (choice & 3)
            wire_request(&wire, is_extended, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 100, 2000);
        put_write(&wire, is_extended, NBD_CMD_FLAG_FUA, 66000, 313);
        put_write(&wire, is_extended, 0, 66000, 1000); // too far
        wire_request(&wire, is_extended, NBD_CMD_DISC, 0, 0, 0, 0);
        seed("stream", wire.bytes, wire.len);
    }
    wire_free(&wire);
}

// A guest's memory (see fuzz_vhost_user.c) with one request of each kind, and one message behind it.
static void seed_vhost_user(void)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_IN,     VIRTIO_BLK_T_OUT,     VIRTIO_BLK_T_FLUSH,
                                     VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
    static const uint8_t message[] = {VU_GET_VRING_BASE, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0};

    for (uint8_t choice = 2; choice < 8; choice++) { // with the messages that set up a queue
        for (unsigned i = 0; i < ARRAY_SIZE(types); i++) {
            bool is_in = types[i] == VIRTIO_BLK_T_IN || types[i] == VIRTIO_BLK_T_GET_ID;
            uint64_t header_at = 0x10400, data_at = 0x10600, status_at = 0x10420;
            uint8_t bytes[3 + 0x800 + sizeof(message)] = {choice, 0x08, 0x00}, *memory = bytes + 3;
            struct vring_desc split[3] = {{header_at, 16, VRING_DESC_F_NEXT, 1},
                                          {data_at, is_in ? 512 : 16, VRING_DESC_F_NEXT, 2},
                                          {status_at, 1, VRING_DESC_F_WRITE, 0}};
            struct vring_packed_desc packed[3] = {{header_at, 16, 0, VRING_DESC_F_NEXT | 0x80},
                                                  {data_at, is_in ? 512 : 16, 0, VRING_DESC_F_NEXT | 0x80},
                                                  {status_at, 1, 7, VRING_DESC_F_WRITE | 0x80}};

            if (types[i] == VIRTIO_BLK_T_OUT)
                split[1].len = packed[1].len = 512;
            split[1].flags |= is_in ? VRING_DESC_F_WRITE : 0;
            packed[1].flags |= is_in ? VRING_DESC_F_WRITE : 0;
            if (choice & 4)
                memcpy(memory, packed, sizeof(packed));
            else
                memcpy(memory, split, sizeof(split));
            if (!(choice & 4))
                memory[256 + 2] = 1; // the available index
            memcpy(memory + 0x400, &types[i], sizeof(types[i]));
            memory[0x608] = 8; // sectors of the range
            memcpy(memory + 0x800, message, sizeof(message));
            seed("vhost_user", bytes, sizeof(bytes));
        }
    }
}

int main(int argc, char **argv)
{
    static const char *const numbers[] = {
        "0", "512", "64K", "3m", "1T", "9223372036854775807", "18446744073709551616"};
    static const char *const specs[] = {"io=buffered,seed=7,after=100", "read.error=0.5:ENOSPC,write.torn=1",
                                        "any.error=0.01,any.delay=0.25:10", "read.short=0.5,write.short=1e-3",
                                        "flush.error=1:EIO,discard.error=0,write_zeroes.delay=1:0"};
    static const char *const requests[] = {"{\"bight\":1,\"verb\":\"show\"}",
                                           "{\"bight\":1,\"verb\":\"set\",\"settings\":{\"io\":\"direct\"}}"};

    if (argc != 3)
        return 2;
    corpus = argv[1];
    if (mkdir(corpus, 0777) < 0 && errno != EEXIST)
        is_failed = true;
    for (unsigned i = 0; i < ARRAY_SIZE(numbers); i++)
        seed_text("options", numbers[i]);
    for (unsigned i = 0; i < ARRAY_SIZE(specs); i++)
        seed_text("fault_spec", specs[i]);
    for (unsigned i = 0; i < ARRAY_SIZE(requests); i++)
        seed_text("control", requests[i]);
    seed_handshakes();
    seed_streams();
    seed_vhost_user();
    if (!is_failed)
        write_file(argv[2], "", 0);
    return is_failed;
}
