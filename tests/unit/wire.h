// A client's side of the NBD wire, for tests: messages into a buffer that grows.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "transport/nbd/proto.h"
#include "util/be.h"

struct wire {
    uint8_t *bytes;
    size_t len, size;
};

static inline uint8_t *wire_grow(struct wire *wire, size_t len)
{
    if (wire->len + len > wire->size) {
        wire->size = 2 * (wire->len + len);
        wire->bytes = realloc(wire->bytes, wire->size);
        if (!wire->bytes)
            abort();
    }
    wire->len += len;
    return wire->bytes + wire->len - len;
}

static inline void wire_put(struct wire *wire, const void *data, size_t len)
{
    if (len)
        memcpy(wire_grow(wire, len), data, len);
}

static inline void wire_put16(struct wire *wire, uint16_t n)
{
    be_put16(wire_grow(wire, 2), n);
}

static inline void wire_put32(struct wire *wire, uint32_t n)
{
    be_put32(wire_grow(wire, 4), n);
}

static inline void wire_put64(struct wire *wire, uint64_t n)
{
    be_put64(wire_grow(wire, 8), n);
}

static inline void wire_free(struct wire *wire)
{
    free(wire->bytes);
    *wire = (struct wire){0};
}

static inline void wire_client_flags(struct wire *wire, uint32_t flags)
{
    wire_put32(wire, flags);
}

static inline void wire_option_head(struct wire *wire, uint32_t option, uint32_t len)
{
    wire_put64(wire, NBD_OPT_MAGIC);
    wire_put32(wire, option);
    wire_put32(wire, len);
}

static inline void wire_option(struct wire *wire, uint32_t option, const void *data, uint32_t len)
{
    wire_option_head(wire, option, len);
    wire_put(wire, data, len);
}

static inline void wire_go(struct wire *wire, uint32_t option, const char *name, const uint16_t *infos,
                           unsigned nr_infos)
{
    wire_option_head(wire, option, (uint32_t)(4 + strlen(name) + 2 + nr_infos * 2));
    wire_put32(wire, (uint32_t)strlen(name));
    wire_put(wire, name, strlen(name));
    wire_put16(wire, (uint16_t)nr_infos);
    for (unsigned i = 0; i < nr_infos; i++)
        wire_put16(wire, infos[i]);
}

// query: NULL for none.
static inline void wire_meta_context(struct wire *wire, uint32_t option, const char *name, const char *query)
{
    uint32_t query_len = query ? 4 + (uint32_t)strlen(query) : 0;

    wire_option_head(wire, option, (uint32_t)(4 + strlen(name) + 4) + query_len);
    wire_put32(wire, (uint32_t)strlen(name));
    wire_put(wire, name, strlen(name));
    wire_put32(wire, query ? 1 : 0);
    if (query) {
        wire_put32(wire, (uint32_t)strlen(query));
        wire_put(wire, query, strlen(query));
    }
}

static inline void wire_request(struct wire *wire, bool is_extended, unsigned type, unsigned flags,
                                uint64_t cookie, uint64_t offset, uint64_t len)
{
    wire_put32(wire, is_extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    wire_put16(wire, (uint16_t)flags);
    wire_put16(wire, (uint16_t)type);
    wire_put64(wire, cookie);
    wire_put64(wire, offset);
    if (is_extended)
        wire_put64(wire, len);
    else
        wire_put32(wire, (uint32_t)len);
}
