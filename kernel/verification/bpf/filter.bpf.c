// tc (clsact, tcx, netkit) and XDP: packets to UDP port 7010 are dropped; what is seen and dropped is counted.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define TC_OK 0
#define TC_DROP 2
#define DROPPED_PORT 7010

enum { SEEN, DROPPED };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&counts, &which);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline int dropped(void *data, void *end)
{
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct udphdr *udp = (void *)(ip + 1);

	count(SEEN);
	if ((void *)(udp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) || ip->protocol != IPPROTO_UDP)
		return 0;
	if (udp->dest != bpf_htons(DROPPED_PORT))
		return 0;
	count(DROPPED);
	return 1;
}

SEC("tc")
int tc_filter(struct __sk_buff *skb)
{
	bpf_skb_pull_data(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct udphdr));
	return dropped((void *)(long)skb->data, (void *)(long)skb->data_end) ? TC_DROP : TC_OK;
}

SEC("xdp")
int xdp_filter(struct xdp_md *ctx)
{
	return dropped((void *)(long)ctx->data, (void *)(long)ctx->data_end) ? XDP_DROP : XDP_PASS;
}

char _license[] SEC("license") = "GPL";
