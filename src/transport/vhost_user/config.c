#include "transport/vhost_user/config.h"

#include <endian.h>
#include <string.h>

#include "core/device.h"
#include "transport/vhost_user/virtqueue.h"
#include "util/util.h"

uint64_t config_features(const struct device *dev)
{
    uint64_t features =
        VU_BIT(VIRTIO_F_VERSION_1) | VU_BIT(VIRTIO_F_ANY_LAYOUT) | VU_BIT(VIRTIO_F_RING_PACKED) |
        VU_BIT(VIRTIO_RING_F_INDIRECT_DESC) | VU_BIT(VIRTIO_RING_F_EVENT_IDX) |
        VU_BIT(VU_F_PROTOCOL_FEATURES) | VU_BIT(VIRTIO_BLK_F_SIZE_MAX) | VU_BIT(VIRTIO_BLK_F_SEG_MAX) |
        VU_BIT(VIRTIO_BLK_F_BLK_SIZE) | VU_BIT(VIRTIO_BLK_F_TOPOLOGY) | VU_BIT(VIRTIO_BLK_F_MQ);

    if (dev->image->is_read_only)
        features |= VU_BIT(VIRTIO_BLK_F_RO);
    else
        features |= VU_BIT(VIRTIO_BLK_F_WRITE_ZEROES);
    if (dev->image->can_discard)
        features |= VU_BIT(VIRTIO_BLK_F_DISCARD);
    if (dev->durability.has_volatile_cache)
        features |= VU_BIT(VIRTIO_BLK_F_FLUSH) | VU_BIT(VIRTIO_BLK_F_CONFIG_WCE);
    return features;
}

void config_fill(const struct device *dev, bool has_writeback, struct virtio_blk_config *config)
{
    uint32_t block_bytes = (uint32_t)max_of(dev->limits.min_block_bytes, SECTOR_BYTES);
    uint32_t blocks = dev->limits.preferred_block_bytes / block_bytes; // a power of two

    memset(config, 0, sizeof(*config));
    config->capacity = htole64(dev->limits.size_bytes / SECTOR_BYTES);
    config->size_max = htole32(CONFIG_SIZE_MAX);
    config->seg_max = htole32(VIRTQUEUE_SEG_MAX);
    config->blk_size = htole32(block_bytes);
    config->physical_block_exp = (uint8_t)__builtin_ctz(blocks);
    config->min_io_size = htole16((uint16_t)blocks);
    config->wce = has_writeback && dev->durability.has_volatile_cache;
    config->num_queues = htole16((uint16_t)min_of(dev->nr_queues, CONFIG_MAX_QUEUES));
    config->max_discard_sectors = htole32(CONFIG_MAX_RANGE_SECTORS);
    config->max_discard_seg = htole32(VIRTQUEUE_MAX_RANGES);
    config->discard_sector_alignment = htole32((uint32_t)(dev->limits.preferred_block_bytes / SECTOR_BYTES));
    config->max_write_zeroes_sectors = htole32(CONFIG_MAX_RANGE_SECTORS);
    config->max_write_zeroes_seg = htole32(VIRTQUEUE_MAX_RANGES);
    config->write_zeroes_may_unmap = dev->image->can_discard;
}
