#include "unit.h"

#include <string.h>

#include "core/device.h"
#include "transport/vhost_user/config.h"

static bool offers(const struct device *dev, unsigned feature)
{
    return config_features(dev) & VU_BIT(feature);
}

static struct device device_of(struct image *image, bool is_read_only, bool has_cache, uint32_t block_bytes)
{
    *image = (struct image){.is_read_only = is_read_only, .can_discard = !is_read_only};
    return (struct device){
        .image = image,
        .nr_queues = 3,
        .durability = {.has_volatile_cache = has_cache},
        .limits = {.size_bytes = 10 * MiB + 700,
                   .min_block_bytes = block_bytes,
                   .preferred_block_bytes = 4096},
    };
}

static void only_what_the_image_can_do_is_offered(void **state)
{
    struct image image;

    (void)state;
    for (unsigned row = 0; row < 4; row++) {
        bool is_read_only = row & 1, has_cache = row & 2;
        struct device dev = device_of(&image, is_read_only, has_cache, 1);

        assert_int_equal(offers(&dev, VIRTIO_BLK_F_RO), is_read_only);
        assert_int_equal(offers(&dev, VIRTIO_BLK_F_DISCARD), !is_read_only);
        assert_int_equal(offers(&dev, VIRTIO_BLK_F_WRITE_ZEROES), !is_read_only);
        assert_int_equal(offers(&dev, VIRTIO_BLK_F_FLUSH), has_cache);
        assert_int_equal(offers(&dev, VIRTIO_BLK_F_CONFIG_WCE), has_cache);
        assert_true(offers(&dev, VIRTIO_F_VERSION_1) && offers(&dev, VIRTIO_F_RING_PACKED));
        assert_false(offers(&dev, VIRTIO_BLK_F_SCSI) || offers(&dev, VIRTIO_BLK_F_SECURE_ERASE));
        image.can_discard = false;
        assert_false(offers(&dev, VIRTIO_BLK_F_DISCARD));
        assert_int_equal(offers(&dev, VIRTIO_BLK_F_WRITE_ZEROES), !is_read_only);
    }
}

static void the_space_tells_sizes_in_sectors_and_blocks(void **state)
{
    static const struct {
        uint32_t block_bytes, blk_size;
        uint8_t exp;
    } rows[] = {{1, 512, 3}, {512, 512, 3}, {1024, 1024, 2}, {4096, 4096, 0}};
    struct virtio_blk_config config;
    struct image image;

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct device dev = device_of(&image, false, true, rows[i].block_bytes);

        memset(&config, 0xaa, sizeof(config));
        config_fill(&dev, true, &config);
        assert_int_equal(config.capacity, (10 * MiB + 700) / 512);
        assert_int_equal(config.blk_size, rows[i].blk_size);
        assert_int_equal(config.physical_block_exp, rows[i].exp);
        assert_int_equal(config.min_io_size, 1 << rows[i].exp);
        assert_int_equal(config.discard_sector_alignment, 8);
        assert_int_equal(config.num_queues, 3);
        assert_true((uint64_t)config.seg_max * config.size_max <= LIMITS_MAX_TRANSFER_BYTES);
        assert_int_equal(config.wce, 1);
        assert_int_equal(config.write_zeroes_may_unmap, 1);
        assert_int_equal(config.alignment_offset, 0);
        assert_int_equal(config.max_secure_erase_sectors, 0);
        config_fill(&dev, false, &config);
        assert_int_equal(config.wce, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_what_the_image_can_do_is_offered),
        cmocka_unit_test(the_space_tells_sizes_in_sectors_and_blocks),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
