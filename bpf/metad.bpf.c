//go:build ignore

/*
 * metad's tc programs. See DESIGN in ARCHITECTURE.md; the programs follow.
 */
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* What the accepted socket's mark says about the packet's source. */
enum tag {
	TAG_NONE = 0, /* seen on a bridge device only: nothing is proved */
	TAG_PORT = 0x80000000, /* the bit: no task yet, the rest is the ifindex of the port it came
				  in on */
}; /* all else: the task_value's tag */

#define TASK_ID_LEN 64

struct task_value {
	__u32 tag;
	__u32 ifindex; /* host end of the task's veth */
	__u8 mac[ETH_ALEN];
	__u16 flags;
	char task_id[TASK_ID_LEN]; /* text, NUL padded, cut if longer */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __be32);
	__type(value, struct task_value);
	__uint(max_entries, 16384);
} ip_task SEC(".maps");

const enum tag *unused_tag __attribute__((unused));

SEC("tc")
int metad_port(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "GPL";
