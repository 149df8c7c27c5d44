// CO-RE: the kernel's structures are declared with what is read and in another order; the loader finds the true offsets in
// /sys/kernel/btf/vmlinux. And the ways in which a program is attached to the kernel's own functions.
#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

struct task_struct {
	char comm[16];
	struct task_struct *real_parent;
	int tgid;
} __attribute__((preserve_access_index));

struct seen {
	__u32 tgid;
	__u32 parent;
	char comm[16];
	char parent_comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct seen);
} executed SEC(".maps");

enum { FENTRY, FEXIT, KPROBE, KRETPROBE, TRACEPOINT };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 5);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline int count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&counts, &which);

	if (value)
		__sync_fetch_and_add(value, 1);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *task)
{
	static const char wanted[] = "verify-core";
	__u32 zero = 0;
	struct seen *seen = bpf_map_lookup_elem(&executed, &zero);
	char comm[16];

	if (!seen)
		return 0;
	bpf_core_read_str(comm, sizeof(comm), &task->comm);
#pragma unroll
	for (int i = 0; i < (int)sizeof(wanted); i++)
		if (comm[i] != wanted[i])
			return 0;
	seen->tgid = BPF_CORE_READ(task, tgid);
	seen->parent = BPF_CORE_READ(task, real_parent, tgid);
	__builtin_memcpy(seen->comm, comm, sizeof(comm));
	BPF_CORE_READ_STR_INTO(&seen->parent_comm, task, real_parent, comm);
	return 0;
}

SEC("fentry/tcp_v4_connect")
int BPF_PROG(on_fentry)
{
	return count(FENTRY);
}

SEC("fexit/tcp_v4_connect")
int BPF_PROG(on_fexit)
{
	return count(FEXIT);
}

SEC("kprobe/tcp_v4_connect")
int on_kprobe(void *ctx)
{
	return count(KPROBE);
}

SEC("kretprobe/tcp_v4_connect")
int on_kretprobe(void *ctx)
{
	return count(KRETPROBE);
}

SEC("tracepoint/sock/inet_sock_set_state")
int on_tracepoint(void *ctx)
{
	return count(TRACEPOINT);
}

char _license[] SEC("license") = "GPL";
