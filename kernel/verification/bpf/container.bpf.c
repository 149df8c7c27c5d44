// What container runtimes and CNIs hang on a cgroup: the device list (runc, crun), a packet filter, socket creation.
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

SEC("cgroup/dev")
int no_zero(struct bpf_cgroup_dev_ctx *ctx)
{
	return !(ctx->major == 1 && ctx->minor == 5);
}

SEC("cgroup_skb/egress")
int no_udp(struct __sk_buff *skb)
{
	__u8 protocol = 0;

	bpf_skb_load_bytes(skb, __builtin_offsetof(struct iphdr, protocol), &protocol, 1);
	return protocol != IPPROTO_UDP;
}

SEC("cgroup/sock_create")
int no_raw(struct bpf_sock *sk)
{
	return sk->type != 3; // SOCK_RAW
}

char _license[] SEC("license") = "GPL";
