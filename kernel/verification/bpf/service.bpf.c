// Services at the socket: connect() and sendto() to a virtual address go to a backend, and the caller goes on seeing the
// virtual address. Cilium's bpf-lb-sock hooks the same points.
#include <linux/bpf.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct place {
	__u32 address; // network order
	__u32 port;    // network order, as in bpf_sock_addr.user_port
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, struct place);
	__type(value, struct place);
} services SEC(".maps"), backends SEC(".maps");

static __always_inline int translate(struct bpf_sock_addr *ctx, void *map)
{
	struct place key = { ctx->user_ip4, ctx->user_port };
	struct place *to = bpf_map_lookup_elem(map, &key);

	if (to) {
		ctx->user_ip4 = to->address;
		ctx->user_port = to->port;
	}
	return 1;
}

SEC("cgroup/connect4")
int service_connect4(struct bpf_sock_addr *ctx)
{
	return translate(ctx, &services);
}

SEC("cgroup/sendmsg4")
int service_sendmsg4(struct bpf_sock_addr *ctx)
{
	return translate(ctx, &services);
}

SEC("cgroup/recvmsg4")
int service_recvmsg4(struct bpf_sock_addr *ctx)
{
	return translate(ctx, &backends);
}

SEC("cgroup/getpeername4")
int service_getpeername4(struct bpf_sock_addr *ctx)
{
	return translate(ctx, &backends);
}

// IPv6: fd96::10 is the virtual address of fd00::2, port 80 of port 7000.
SEC("cgroup/connect6")
int service_connect6(struct bpf_sock_addr *ctx)
{
	if (ctx->user_ip6[0] != bpf_htonl(0xfd960000) || ctx->user_ip6[3] != bpf_htonl(0x10))
		return 1;
	ctx->user_ip6[0] = bpf_htonl(0xfd000000);
	ctx->user_ip6[3] = bpf_htonl(2);
	ctx->user_port = bpf_htons(7000);
	return 1;
}

char _license[] SEC("license") = "GPL";
