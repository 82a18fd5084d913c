// What the guest is told of the device: features and configuration space (virtio 1.2, 5.2.3, 5.2.4).
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "transport/vhost_user/proto.h"

#define CONFIG_MAX_QUEUES 64
// So that no request is longer than what a device takes.
#define CONFIG_SIZE_MAX (256 * 1024)
#define CONFIG_MAX_RANGE_SECTORS (1U << 22) // of one DISCARD or WRITE_ZEROES: 2 GiB

struct device;

// The virtio features that can be offered for this device, and VU_F_PROTOCOL_FEATURES. Pure.
uint64_t config_features(const struct device *dev);

#define CONFIG_PROTOCOL_FEATURES                                                                 \
    (VU_BIT(VU_PROTOCOL_F_MQ) | VU_BIT(VU_PROTOCOL_F_REPLY_ACK) | VU_BIT(VU_PROTOCOL_F_CONFIG) | \
     VU_BIT(VU_PROTOCOL_F_INFLIGHT_SHMFD) | VU_BIT(VU_PROTOCOL_F_RESET_DEVICE) |                 \
     VU_BIT(VU_PROTOCOL_F_CONFIGURE_MEM_SLOTS) | VU_BIT(VU_PROTOCOL_F_BACKEND_REQ))

// has_writeback: the cache mode that the guest has chosen. Pure.
void config_fill(const struct device *dev, bool has_writeback, struct virtio_blk_config *config);
