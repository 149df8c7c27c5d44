// Socket maps. sockops puts every established connection of a cgroup into a map by its ports; sk_msg hands what is sent on
// one of them to its peer's receive queue, past the network. sk_skb does the same for what is received: a proxy.
#include <linux/bpf.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define PROXY_IN 7101
#define PROXY_OUT 7102

struct ports {
	__u32 local;
	__u32 remote;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 64);
	__type(key, struct ports);
	__type(value, __u32);
} connections SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u32);
} proxy SEC(".maps");

enum { ESTABLISHED, MESSAGES, BYTES, PROXIED };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void count(__u32 which, __u64 amount)
{
	__u64 *value = bpf_map_lookup_elem(&counts, &which);

	if (value)
		__sync_fetch_and_add(value, amount);
}

SEC("sockops")
int remember(struct bpf_sock_ops *ctx)
{
	struct ports key = { ctx->local_port, bpf_ntohl(ctx->remote_port) };
	__u32 in = 0, out = 1;

	if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	count(ESTABLISHED, 1);
	if (key.local == PROXY_IN)
		bpf_sock_map_update(ctx, &proxy, &in, BPF_ANY);
	else if (key.local == PROXY_OUT)
		bpf_sock_map_update(ctx, &proxy, &out, BPF_ANY);
	else if (key.remote != PROXY_IN && key.remote != PROXY_OUT)
		bpf_sock_hash_update(ctx, &connections, &key, BPF_NOEXIST);
	return 1;
}

SEC("sk_msg")
int shortcut(struct sk_msg_md *msg)
{
	struct ports peer = { bpf_ntohl(msg->remote_port), msg->local_port };
	__u32 size = msg->size;

	if (bpf_msg_redirect_hash(msg, &connections, &peer, BPF_F_INGRESS) == SK_PASS) {
		count(MESSAGES, 1);
		count(BYTES, size);
	}
	return SK_PASS;
}

SEC("sk_skb/stream_parser")
int parse(struct __sk_buff *skb)
{
	return skb->len;
}

SEC("sk_skb/stream_verdict")
int pass_on(struct __sk_buff *skb)
{
	if (skb->local_port != PROXY_IN)
		return SK_PASS;
	count(PROXIED, skb->len);
	return bpf_sk_redirect_map(skb, &proxy, 1, 0);
}

char _license[] SEC("license") = "GPL";
