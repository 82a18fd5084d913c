#include "transport/ublk/ctrl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "util/util.h"

// Far beyond what any command takes; STOP_DEV and DEL_DEV wait for requests in flight.
#define CTRL_TIMEOUT_S 30

static int kernel_open(struct ublk_ctrl *ctrl)
{
    int ret;

    ctrl->fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
    if (ctrl->fd < 0)
        return -errno;
    ret = io_uring_queue_init(4, &ctrl->ring, IORING_SETUP_SQE128);
    if (ret < 0)
        close(ctrl->fd);
    return ret;
}

static void kernel_close(struct ublk_ctrl *ctrl)
{
    io_uring_queue_exit(&ctrl->ring);
    close(ctrl->fd);
}

static int kernel_send(struct ublk_ctrl *ctrl, uint32_t cmd_op, const struct ublk_ctrl_cmd *cmd)
{
    struct __kernel_timespec timeout = {.tv_sec = CTRL_TIMEOUT_S};
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ctrl->ring);
    struct io_uring_cqe *cqe;
    bool is_ours;
    int ret;

    if (!sqe)
        return -EBUSY; // commands before it have timed out
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, ctrl->fd, NULL, 0, 0);
    sqe->cmd_op = cmd_op;
    sqe->user_data = ++ctrl->nr_sent;
    memcpy(sqe->cmd, cmd, sizeof(*cmd));
    ret = io_uring_submit(&ctrl->ring);
    if (ret < 0)
        return ret;
    for (;;) {
        ret = io_uring_wait_cqe_timeout(&ctrl->ring, &cqe, &timeout);
        if (ret == -EINTR)
            continue;
        if (ret < 0)
            return ret == -ETIME ? -ETIMEDOUT : ret;
        is_ours = cqe->user_data == ctrl->nr_sent; // not that of one that has timed out
        ret = cqe->res;
        io_uring_cqe_seen(&ctrl->ring, cqe);
        if (is_ours)
            return ret;
    }
}

static const struct ublk_kernel kernel = {
    .dev_dir = "/dev",
    .open = kernel_open,
    .send = kernel_send,
    .close = kernel_close,
};
const struct ublk_kernel *ublk_kernel = &kernel;

void ublk_ctrl_path(char path[UBLK_PATH_BYTES], char kind, uint32_t id)
{
    snprintf(path, UBLK_PATH_BYTES, "%.40s/ublk%c%u", ublk_kernel->dev_dir, kind, id);
}

uint32_t ublk_ctrl_encode(const struct ublk_ctrl *ctrl, enum ublk_cmd cmd)
{
    bool is_get = cmd == UBLK_GET_QUEUE_AFFINITY || cmd == UBLK_GET_DEV_INFO || cmd == UBLK_GET_DEV_INFO2 ||
                  cmd == UBLK_GET_FEATURES || cmd == UBLK_DEL_DEV_ASYNC;
    size_t bytes = cmd >= UBLK_FETCH ? sizeof(struct ublk_io_cmd) : sizeof(struct ublk_ctrl_cmd);

    if (!(ctrl->features & UBLK_F_CMD_IOCTL_ENCODE))
        return cmd;
    return (uint32_t)_IOC(is_get ? _IOC_READ : _IOC_READ | _IOC_WRITE, 'u', cmd, bytes);
}

int ublk_ctrl_send(struct ublk_ctrl *ctrl, enum ublk_cmd cmd, void *payload, unsigned payload_bytes,
                   uint64_t data)
{
    uint32_t cmd_op = ublk_ctrl_encode(ctrl, cmd);
    struct ublk_ctrl_cmd ctrl_cmd = {.dev_id = ctrl->id, .queue_id = UINT16_MAX, .data = data};
    char *buf = calloc(1, UBLK_PATH_BYTES + payload_bytes);
    int ret;

    if (!buf)
        return -ENOMEM;
    // With the path before the payload: the kernel looks at the file's mode to know whether we may.
    if (cmd == UBLK_GET_DEV_INFO2 ||
        (ctrl->is_unprivileged && cmd != UBLK_ADD_DEV && cmd != UBLK_GET_FEATURES)) {
        ublk_ctrl_path(buf, 'c', ctrl->id);
        ctrl_cmd.dev_path_len = (uint16_t)(strlen(buf) + 1);
    }
    ctrl_cmd.len = (uint16_t)(ctrl_cmd.dev_path_len + payload_bytes);
    ctrl_cmd.addr = ctrl_cmd.len ? (uintptr_t)buf : 0;
    if (payload)
        memcpy(buf + ctrl_cmd.dev_path_len, payload, payload_bytes);
    ret = ublk_kernel->send(ctrl, cmd_op, &ctrl_cmd);
    if (ret == -ETIMEDOUT)
        return ret; // NOLINT(clang-analyzer-unix.Malloc): buf is the kernel's, which may still write to it
    if (payload)
        memcpy(payload, buf + ctrl_cmd.dev_path_len, payload_bytes);
    free(buf);
    return ret;
}

int ublk_ctrl_open(struct ublk_ctrl *ctrl, struct err *err)
{
    uint64_t features = 0;
    int ret;

    *ctrl = (struct ublk_ctrl){.features = UBLK_F_CMD_IOCTL_ENCODE};
    ret = ublk_kernel->open(ctrl);
    if (ret == -ENOENT || ret == -ENODEV || ret == -ENXIO)
        return err_set(err, ret,
                       "ublk: /dev/ublk-control: not there; load the driver: modprobe ublk_drv "
                       "(Linux 6.0 or later, if it was built), or use --fuse or --nbd");
    if (ret < 0)
        return err_set(err, ret, "ublk: /dev/ublk-control: %s; root may use it, or a udev rule lets you",
                       strerror(-ret));
    // Without an answer to that it knows the old numbers, and maybe the new ones: those are safe to use.
    ret = ublk_ctrl_send(ctrl, UBLK_GET_FEATURES, &features, sizeof(features), 0);
    ctrl->features = ret < 0 ? 0 : features;
    return 0;
}

void ublk_ctrl_close(struct ublk_ctrl *ctrl)
{
    ublk_kernel->close(ctrl);
}

int ublk_ctrl_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info)
{
    int ret;

    ctrl->id = info->dev_id;
    ret = ublk_ctrl_send(ctrl, UBLK_ADD_DEV, info, sizeof(*info), 0);
    if (ret < 0)
        return ret;
    ctrl->id = info->dev_id;
    ctrl->is_unprivileged = info->flags & UBLK_F_UNPRIVILEGED_DEV;
    return 0;
}

int ublk_ctrl_find(struct ublk_ctrl *ctrl, uint32_t id, struct ublk_dev_info *info)
{
    int ret;

    ctrl->id = id;
    ret = ublk_ctrl_send(ctrl, UBLK_GET_DEV_INFO2, info, sizeof(*info), 0);
    if (ret == -EINVAL || ret == -EOPNOTSUPP) // before 6.5
        ret = ublk_ctrl_send(ctrl, UBLK_GET_DEV_INFO, info, sizeof(*info), 0);
    if (ret < 0)
        return ret;
    ctrl->is_unprivileged = info->flags & UBLK_F_UNPRIVILEGED_DEV;
    return 0;
}
