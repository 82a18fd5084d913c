// The control commands of the ublk driver. Cold; every one is bounded in time.
#pragma once

#include <liburing.h>
#include <stdbool.h>

#include "transport/ublk/proto.h"
#include "util/log.h"

#define UBLK_PATH_BYTES 64

struct ublk_ctrl {
    int fd;
    struct io_uring ring;
    uint64_t features; // UBLK_F_* that the kernel has, if it can say
    uint32_t id;       // of the device
    bool is_unprivileged;
    uint64_t nr_sent;
};

// The kernel, or what stands in for it in a test.
struct ublk_kernel {
    const char *dev_dir;
    int (*open)(struct ublk_ctrl *ctrl);
    // What the driver answers; -ETIMEDOUT.
    int (*send)(struct ublk_ctrl *ctrl, uint32_t cmd_op, const struct ublk_ctrl_cmd *cmd);
    void (*close)(struct ublk_ctrl *ctrl);
};
extern const struct ublk_kernel *ublk_kernel;

// Asks for the features. 0 or a negative errno with err set.
int ublk_ctrl_open(struct ublk_ctrl *ctrl, struct err *err);
void ublk_ctrl_close(struct ublk_ctrl *ctrl);

// A command with payload_bytes at payload (either way), or NULL. 0 or a negative errno.
int ublk_ctrl_send(struct ublk_ctrl *ctrl, enum ublk_cmd cmd, void *payload, unsigned payload_bytes,
                   uint64_t data);

// The number of a command as this kernel wants it; also for those to /dev/ublkcN.
uint32_t ublk_ctrl_encode(const struct ublk_ctrl *ctrl, enum ublk_cmd cmd);

// Makes the device that info asks for, and info what it has become. ctrl is for that device from now on.
int ublk_ctrl_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info);
// Makes ctrl for the device id, and info what is known of it. -ENODEV: there is none.
int ublk_ctrl_find(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_dev_info *info);

// "/dev/ublkc3", "/dev/ublkb3"
void ublk_ctrl_path(char path[UBLK_PATH_BYTES], char kind, uint32_t id);
