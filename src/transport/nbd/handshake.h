// The NBD handshake as bytes in, bytes out: no sockets in here, so tests and fuzzers can drive it.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct device;

enum nbd_mode {
    NBD_MODE_SIMPLE,
    NBD_MODE_STRUCTURED,
    NBD_MODE_EXTENDED,
};

enum nbd_handshake_state {
    NBD_HANDSHAKE_GOES_ON,
    NBD_HANDSHAKE_DONE,  // the transmission phase begins after out has been sent
    NBD_HANDSHAKE_CLOSE, // the connection ends after out has been sent
};

// Option data beyond this is skipped and refused; no option that we know needs more.
#define NBD_MAX_OPTION_BYTES (64 * 1024)
// Room for one whole option.
#define NBD_HANDSHAKE_IN_BYTES (16 + NBD_MAX_OPTION_BYTES)

struct nbd_handshake {
    struct device *const *devs; // exports; the first is also ""
    unsigned nr_devs;
    enum nbd_handshake_state state;
    bool has_client_flags;
    bool want_no_zeroes;
    uint64_t skip_bytes; // of an option's data
    enum nbd_mode mode;
    struct device *dev;      // DONE: the export
    struct device *meta_dev; // for which base:allocation was selected last, or NULL
    // What is to be sent. The caller takes it and sets out_len to 0.
    uint8_t *out;
    size_t out_len, out_size;
};

// Puts the greeting into out. 0 or -ENOMEM.
int nbd_handshake_begin(struct nbd_handshake *handshake, struct device *const *devs, unsigned nr_devs);
void nbd_handshake_end(struct nbd_handshake *handshake);

// Looks at what has been received and goes on as far as one message. Returns the bytes used up: 0 when
// more is needed, and then less than NBD_HANDSHAKE_IN_BYTES are here. Only while state GOES_ON.
size_t nbd_handshake_input(struct nbd_handshake *handshake, const uint8_t *in, size_t in_len);

// Transmission flags of the device. Pure.
uint16_t nbd_transmission_flags(const struct device *dev, enum nbd_mode mode);
