// Cilium's datapath between hosts and on them: a packet gets its tunnel's key by a program and leaves by a VXLAN device
// that serves all tunnels; another is handed to a neighbour's device; a flow gets its departure time for fq.
#include <linux/bpf.h>
#include <linux/if_ether.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define TC_OK 0

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4); // 0: the overlay's interface, 1: the neighbour's, 2: when the next packet leaves, 3: remote
	__type(key, __u32);
	__type(value, __u64);
} settings SEC(".maps");

static __always_inline __u64 *setting(__u32 which)
{
	return bpf_map_lookup_elem(&settings, &which);
}

SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = { .tunnel_id = 77, .tunnel_ttl = 64 };
	__u64 *device = setting(0), *remote = setting(3);

	if (!device || !remote)
		return TC_OK;
	key.remote_ipv4 = *remote;
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX))
		return TC_OK;
	return bpf_redirect(*device, 0);
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};
	__u64 *device = setting(1);

	if (!device || bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) || key.tunnel_id != 77)
		return TC_OK;
	return bpf_redirect(*device, 0);
}

SEC("tc")
int to_neighbour(struct __sk_buff *skb)
{
	__u64 *device = setting(1);

	if (!device || skb->protocol != bpf_htons(ETH_P_IP))
		return TC_OK;
	return bpf_redirect_peer(*device, 0);
}

// 256 KiB/s: every packet leaves its length's time after the one before.
SEC("tc")
int pace(struct __sk_buff *skb)
{
	__u64 *next = setting(2);
	__u64 now = bpf_ktime_get_ns();

	if (!next || skb->protocol != bpf_htons(ETH_P_IP))
		return TC_OK;
	if (*next < now)
		*next = now;
	skb->tstamp = *next;
	*next += (__u64)skb->wire_len * 1000000000 / (256 << 10);
	return TC_OK;
}

char _license[] SEC("license") = "GPL";
