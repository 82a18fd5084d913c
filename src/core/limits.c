#include "core/limits.h"

#include "image/image.h"
#include "util/util.h"

struct limits limits_of(const struct image *image, uint32_t block_bytes)
{
    uint32_t min_block_bytes = block_bytes ? block_bytes : 1;

    return (struct limits){
        .size_bytes = round_down(image->size_bytes, min_block_bytes),
        .min_block_bytes = min_block_bytes,
        // Pages are what file systems and page cache are made of, also above a 512-byte disk.
        .preferred_block_bytes = max_of(max_of(min_block_bytes, image->dio_offset_align), 4096U),
        .max_transfer_bytes = LIMITS_MAX_TRANSFER_BYTES,
        .max_buf_bytes = UINT64_MAX,
        .is_read_only = image->is_read_only,
    };
}
