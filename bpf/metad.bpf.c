//go:build ignore

/*
 * metad's tc programs. They take TCP for 169.254.170.2:80 from a container's veth, tag it with what
 * the veth proves about the sender, and move it into the server's namespace and back.
 *
 *   metad_port    tc ingress, every veth that is a port of a watched bridge
 *   metad_bridge  tc ingress, the bridge devices: packets that came in by a port without a hook
 *   metad_enter   tc ingress, metad1 (the server's end): admits what the other programs sent
 *   metad_carry   tc egress, metad1: saves the socket's mark from the veth
 *   metad_reply   tc ingress, metad0 (the host's end): the way back
 *   metad_host    tc egress, metad0: what the host itself sends to the endpoint
 *
 * metad_port and metad_bridge see other people's traffic, so they only filter. Their second halves,
 * from_port and from_bridge, are reached through the program array `slots`, which is never pinned:
 * the kernel empties it when the last process that has it open dies. From then on every packet is
 * left alone.
 *
 * Limits: Linux 5.10 (bpf_redirect_peer); no CO-RE, no atomics beyond -mcpu=v2. IPv4 only. A
 * fragment has no TCP port, so every TCP fragment for the address is taken.
 */
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include "connections.h"
#include "events.h"
#include "metad.h"
#include "neighbours.h"
#include "packet.h"

/* The result of filter for a packet that may be for the endpoint while no server is there. It is
 * none of tc's answers. */
#define FILTER_UNSERVED (TC_ACT_VALUE_MAX + 1)

/* How long a handshake may take: after it the client repeats its SYN. */
#define HANDSHAKE_NS (1ULL * 1000 * 1000 * 1000)

/* conclude counts the verdict and returns ret, tc's answer. */
static __always_inline int conclude(enum verdict v, int ret)
{
	__u32 key = v;
	struct verdict_count *n = bpf_map_lookup_elem(&verdicts, &key);

	if (n)
		n->packets++;
	return ret;
}

/* filter sees every packet that a container sends, and leaves most alone. A packet that may be for
 * the endpoint goes on in the slot's program, if a server is there: then filter does not return.
 * Otherwise it returns tc's answer, or FILTER_UNSERVED. */
static __always_inline int filter(struct __sk_buff *skb, enum slot slot)
{
	const int headers = sizeof(struct ethhdr) + sizeof(struct iphdr);
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return conclude(VERDICT_NOT_IPV4, TC_ACT_UNSPEC);
	if ((void *)(ip + 1) > data_end) {
		if (bpf_skb_pull_data(skb, headers))
			return conclude(VERDICT_MALFORMED, TC_ACT_UNSPEC);
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		ip = data + sizeof(struct ethhdr);
		if ((void *)(ip + 1) > data_end)
			return conclude(VERDICT_MALFORMED, TC_ACT_UNSPEC);
	}
	if (ip->daddr != META_ADDR || ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_NOT_META, TC_ACT_UNSPEC);
	if (skb->vlan_present)
		return conclude(VERDICT_VLAN, TC_ACT_UNSPEC);
	/* The length adds nothing, but the verifier does not know that. The kernel patches a slot
	 * that the verifier knows into the code, and emptying the slot then takes a grace period
	 * for each program. Meanwhile one program would still send packets to a server that is
	 * gone, and the other would leave them alone. */
	bpf_tail_call(skb, &slots, slot + (skb->len >> 31));
	/* The slot is empty. The TCP port has not been compared yet: unserved does it, so that
	 * exit_drop does not drop packets for other TCP ports. */
	return FILTER_UNSERVED;
}

/* deliver moves the packet into the server's namespace. */
static __always_inline int deliver(struct __sk_buff *skb, const struct sender *s, __u32 tag,
				   enum verdict v)
{
	struct handshake *h = s->syn ? handshake_of(skb, s) : NULL;

	if (h) {
		/* Two CPUs at once may leave a mixture of two entries, and a packet may get a wrong
		 * tag from it. metad_reply drops the answer to such a packet. */
		__builtin_memcpy(&h->addr, &s->addr, sizeof(h->addr));
		h->sport = s->sport;
		h->tag = tag;
		h->ifindex = skb->ifindex;
		h->begun_ns = bpf_ktime_get_ns();
	}
	skb->mark = tag ? tag : MARK_UNPROVED;
	/* The frame has the bridge's MAC, so the stack would drop it as another host's. */
	bpf_skb_change_type(skb, PACKET_HOST);
	return conclude(v, bpf_redirect_peer(metad0_ifindex, 0));
}

/* refuse drops the packet and logs it. */
static __always_inline int refuse(struct __sk_buff *skb, const struct sender *s, enum verdict v)
{
	emit_event(skb, s, v);
	return conclude(v, TC_ACT_SHOT);
}

/* count adds the packet to its task's counters. */
static __always_inline void count(struct __sk_buff *skb, const struct sender *s)
{
	struct task_counters *c = bpf_map_lookup_elem(&counters, &s->addr);
	__u64 tick = bpf_jiffies64();

	if (!c)
		return;
	c->packets++;
	c->bytes += skb->len;
	c->connections += s->syn;
	if (c->last_seen_tick == tick)
		return; /* reading the clock is a tenth of the work for a packet */
	c->last_seen_tick = tick;
	c->last_seen_ns = bpf_ktime_get_ns();
}

/* container_at returns the tag of the container whose cgroup, level steps below the root, is the
 * cgroup of the packet's socket or an ancestor of it: a container may make cgroups of its own.
 * 0: there is none, or the packet was forwarded and has no socket. */
static __always_inline __u32 container_at(struct __sk_buff *skb, void *map, __u8 level)
{
	__u64 id = level ? bpf_skb_ancestor_cgroup_id(skb, level) : 0;
	struct container_value *c = id ? bpf_map_lookup_elem(map, &id) : NULL;

	return c ? c->tag : 0;
}

/* tag_of returns the tag of the container that sent the packet if the task has that container,
 * otherwise the tag of the task. Two levels without a loop, because some of the supported kernels
 * do not load a loop here. */
static __always_inline __u32 tag_of(struct __sk_buff *skb, const struct task_value *t)
{
	__u32 tag = container_at(skb, &container_cgroup, t->levels[0]);

	if (!tag)
		tag = container_at(skb, &container_cgroup, t->levels[1]);
	return (tag & ~TAG_CONTAINER) == t->tag ? tag : t->tag;
}

SEC("tc")
int from_port(struct __sk_buff *skb)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	__u32 ifindex = skb->ifindex;
	struct task_value *t;
	__u32 tag;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	if (s.addr == host_addr)
		return refuse(skb, &s, VERDICT_PORT_HOST);
	t = bpf_map_lookup_elem(&ip_task, &s.addr);
	if (t) {
		if (t->ifindex != ifindex)
			return refuse(skb, &s, VERDICT_PORT_WRONG_PORT);
		if (!same_mac(t->mac, s.mac))
			return refuse(skb, &s, VERDICT_PORT_WRONG_MAC);
		if (is_agents(skb, &s))
			return conclude(VERDICT_PORT_AGENT, TC_ACT_UNSPEC);
		if (is_busy(&s, t->tag))
			return conclude(VERDICT_PORT_BUSY, TC_ACT_SHOT);
		count(skb, &s);
		tag = tag_of(skb, t);
		return deliver(skb, &s, tag,
			       tag == t->tag ? VERDICT_PORT_TASK : VERDICT_PORT_CONTAINER);
	}
	if (is_agents(skb, &s) || is_left(&s))
		return conclude(VERDICT_PORT_AGENT, TC_ACT_UNSPEC);
	tag = TAG_PORT | ifindex;
	if (is_busy(&s, tag))
		return conclude(VERDICT_PORT_BUSY, TC_ACT_SHOT);
	learn_port(skb, &s, tag);
	emit_event(skb, &s, VERDICT_PORT_UNKNOWN);
	return deliver(skb, &s, tag, VERDICT_PORT_UNKNOWN);
}

SEC("tc")
int from_bridge(struct __sk_buff *skb)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	struct task_value *t;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	if (s.addr == host_addr)
		return refuse(skb, &s, VERDICT_BRIDGE_HOST);
	t = bpf_map_lookup_elem(&ip_task, &s.addr);
	if (t) {
		if (!same_mac(t->mac, s.mac))
			return refuse(skb, &s, VERDICT_BRIDGE_WRONG_MAC);
		if (is_agents(skb, &s))
			return conclude(VERDICT_BRIDGE_AGENT, TC_ACT_UNSPEC);
		count(skb, &s);
		if (trust_bridge)
			return deliver(skb, &s, t->tag, VERDICT_BRIDGE_TRUSTED);
		return deliver(skb, &s, TAG_NONE, VERDICT_BRIDGE_TASK);
	}
	if (is_agents(skb, &s) || is_left(&s))
		return conclude(VERDICT_BRIDGE_AGENT, TC_ACT_UNSPEC);
	if (learn_bridge(skb, &s))
		return refuse(skb, &s, VERDICT_BRIDGE_CLAIMED);
	emit_event(skb, &s, VERDICT_BRIDGE_UNKNOWN);
	return deliver(skb, &s, TAG_NONE, VERDICT_BRIDGE_UNKNOWN);
}

/* unserved decides about a packet for the endpoint while no new connection is the server's.
 *
 * A server that stops answers on the connections that it has: their packets go to it.
 *
 * A client whose SYN reached the server is connected once it has the SYN-ACK. If the server was
 * killed and the client's next packets were left alone, it might never learn that the server is
 * gone: where conntrack knows the client's TCP port from an earlier connection to the agent, it
 * calls these packets invalid, and they are lost until the client gives up. So they go to the
 * server's namespace, which lasts a little longer than the server and resets the connection. */
static __always_inline int unserved(struct __sk_buff *skb, enum slot slot)
{
	struct sender s = {};
	enum verdict v = parse(skb, &s);
	struct handshake *h;

	if (v != VERDICT_OPEN)
		return conclude(v, TC_ACT_UNSPEC);
	if (is_servers(skb, &s, slot))
		return deliver(skb, &s, TAG_NONE, VERDICT_UNARMED_OPEN);
	h = s.sport ? handshake_of(skb, &s) : NULL;
	if (h && h->sport == s.sport && !__builtin_memcmp(&h->addr, &s.addr, sizeof(h->addr))) {
		if (s.syn)
			h->sport = 0; /* what follows the new SYN goes where the SYN goes */
		else if (h->ifindex == skb->ifindex &&
			 bpf_ktime_get_ns() - h->begun_ns < HANDSHAKE_NS)
			return deliver(skb, &s, h->tag, VERDICT_UNARMED_OPEN);
	}
	if (exit_drop)
		return conclude(VERDICT_UNARMED_DROP, TC_ACT_SHOT);
	return conclude(VERDICT_UNARMED, TC_ACT_UNSPEC);
}

SEC("tc")
int metad_port(struct __sk_buff *skb)
{
	int ret = filter(skb, SLOT_PORT);

	return ret == FILTER_UNSERVED ? unserved(skb, SLOT_PORT) : ret;
}

SEC("tc")
int metad_bridge(struct __sk_buff *skb)
{
	int ret = filter(skb, SLOT_BRIDGE);

	return ret == FILTER_UNSERVED ? unserved(skb, SLOT_BRIDGE) : ret;
}

/* to_server sends a packet of the host's route to the server's namespace. The veth would remove the
 * mark. So the packet goes to metad0's ingress, where metad_reply redirects it: the mark stays. */
static __always_inline int to_server(struct __sk_buff *skb, __u32 tag, enum verdict v)
{
	skb->mark = tag ? tag : MARK_UNPROVED;
	return conclude(v, bpf_redirect(metad0_ifindex, BPF_F_INGRESS));
}

/* The host's route to the endpoint leads here. It is for the host's own processes. A packet that
 * the host forwards, for a container on a bridge that is not watched or for another host, has no
 * proof. It is sent to a closed TCP port of the server's namespace, which resets it: the client
 * fails at once. */
SEC("tc")
int metad_host(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct tcphdr *tcp = (void *)(ip + 1);
	__u32 tag;

	if (skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > data_end ||
	    ip->daddr != META_ADDR || ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_HOST_NOT_OURS, TC_ACT_SHOT);
	if (ip->saddr == host_addr && !skb->ingress_ifindex) {
		tag = container_at(skb, &host_cgroup, host_levels[0]);
		if (!tag)
			tag = container_at(skb, &host_cgroup, host_levels[1]);
		return to_server(skb, tag, tag ? VERDICT_HOST_CONTAINER : VERDICT_HOST);
	}
	if (ip->ihl != 5 || ip->frag_off & bpf_htons(IP_MF | IP_OFFSET) ||
	    (void *)(tcp + 1) > data_end || tcp->dest != META_DPORT ||
	    set_tcp_port(skb, sizeof(struct ethhdr) + sizeof(*ip), offsetof(struct tcphdr, dest),
			 META_DPORT, REFUSE_DPORT))
		return conclude(VERDICT_HOST_NOT_OURS, TC_ACT_SHOT);
	return to_server(skb, TAG_NONE, VERDICT_HOST_REFUSED);
}

/* A packet of the other programs has a mark. A packet that a process sends on metad0 past the
 * egress hook (AF_PACKET with PACKET_QDISC_BYPASS) has none, because the veth removes it. */
SEC("tc")
int metad_enter(struct __sk_buff *skb)
{
	if (!skb->mark)
		return conclude(VERDICT_ENTER_UNMARKED, TC_ACT_SHOT);
	if (skb->mark == MARK_UNPROVED)
		skb->mark = TAG_NONE;
	return conclude(VERDICT_ENTERED, TC_ACT_UNSPEC);
}

/* The frame from metad1 to metad0 needs no destination MAC: there is one receiver, and metad_reply
 * writes the real one. So the field carries the mark, which the veth removes. From it metad_reply
 * knows which task's connection an answer belongs to. */
struct carrier {
	__u8 prefix[2]; /* unicast, locally administered */
	__be32 tag;
} __attribute__((packed));

SEC("tc")
int metad_carry(struct __sk_buff *skb)
{
	struct carrier c = {.prefix = {0x02, 0}, .tag = bpf_htonl(skb->mark)};

	bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), &c, sizeof(c), 0);
	return conclude(VERDICT_CARRIED, TC_ACT_UNSPEC);
}

/* leave sends an answer to its client, by a port's peer or by a bridge device. */
static __always_inline int leave(struct __sk_buff *skb, __u32 ifindex, const __u8 *mac,
				 enum verdict v)
{
	bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), mac, ETH_ALEN, 0);
	bpf_skb_change_type(skb, PACKET_HOST); /* as in deliver */
	if (v == VERDICT_REPLY_BRIDGE)
		return conclude(v, bpf_redirect(ifindex, 0));
	return conclude(v, bpf_redirect_peer(ifindex, 0));
}

/* hang_up ends the server's connection that the packet belongs to, because its client is gone. The
 * packet goes back as the reset that the client's stack would have sent. Otherwise the connection
 * would wait for the client for seconds, and the next owner of the address could not connect from
 * the same TCP port: the old connection would answer its SYN, and the answer would not reach it.
 *
 * Addresses, TCP ports and the two sequence numbers are swapped. That leaves the checksums as they
 * are, and the reset has the sequence number that the server expects. */
static __always_inline int hang_up(struct __sk_buff *skb, const struct iphdr *ip)
{
	const int tcp = sizeof(struct ethhdr) + sizeof(struct iphdr);
	const int at = tcp - 2 * (int)sizeof(__be32);
	struct {
		__be32 saddr, daddr;
		__be16 sport, dport;
		__be32 seq, ack;
		__be16 flags; /* and the header's length, in the high byte */
	} __attribute__((packed)) was, reset;

	if (ip->ihl != 5 || ip->frag_off & bpf_htons(IP_MF | IP_OFFSET) ||
	    bpf_skb_load_bytes(skb, at, &was, sizeof(was)) || was.flags & bpf_htons(TCP_RST) ||
	    !(was.flags & bpf_htons(TCP_ACK)))
		goto drop;
	reset.saddr = was.daddr;
	reset.daddr = was.saddr;
	reset.sport = was.dport;
	reset.dport = was.sport;
	reset.seq = was.ack;
	reset.ack = was.seq;
	reset.flags = (was.flags & bpf_htons(0xff00)) | bpf_htons(TCP_RST | TCP_ACK);
	if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), was.flags, reset.flags,
				sizeof(reset.flags)) ||
	    bpf_skb_store_bytes(skb, at, &reset, sizeof(reset), 0))
		goto drop;
	skb->mark = MARK_UNPROVED;
	bpf_skb_change_type(skb, PACKET_HOST);
	return conclude(VERDICT_REPLY_NOT_THEIRS, bpf_redirect_peer(metad0_ifindex, 0));
drop:
	return conclude(VERDICT_REPLY_NOT_THEIRS, TC_ACT_SHOT);
}

SEC("tc")
int metad_reply(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct tcphdr *tcp;
	struct neighbour *n;
	struct task_value *t;
	__u32 tag;
	__be32 dst;

	if (skb->protocol != bpf_htons(ETH_P_IP) || (void *)(ip + 1) > data_end ||
	    ip->protocol != IPPROTO_TCP)
		return conclude(VERDICT_REPLY_NOT_OURS, TC_ACT_SHOT);
	/* From metad_host, which has counted it. What comes from the server has no mark. */
	if (skb->mark && ip->daddr == META_ADDR) {
		bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect_peer(metad0_ifindex, 0);
	}
	if (ip->saddr != META_ADDR)
		return conclude(VERDICT_REPLY_NOT_OURS, TC_ACT_SHOT);
	tag = bpf_ntohl(((struct carrier *)eth->h_dest)->tag);
	dst = ip->daddr;
	tcp = (void *)(ip + 1);
	if (ip->ihl == 5 && (void *)(tcp + 1) <= data_end && tcp->source == REFUSE_DPORT) {
		set_tcp_port(skb, sizeof(*eth) + sizeof(*ip), offsetof(struct tcphdr, source),
			     REFUSE_DPORT, META_DPORT);
		bpf_skb_change_type(skb, PACKET_HOST);
		return conclude(VERDICT_REPLY_REFUSED, TC_ACT_UNSPEC);
	}
	/* Only the host's processes were let in with this address. */
	if (dst == host_addr) {
		bpf_skb_change_type(skb, PACKET_HOST);
		return conclude(VERDICT_REPLY_HOST, TC_ACT_UNSPEC);
	}
	/* Tasks first: once an address is a task's, what goes there leaves by that task's port. And
	 * only what belongs there: a connection outlives its client, and its address may be
	 * another's by then. */
	t = bpf_map_lookup_elem(&ip_task, &dst);
	if (t) {
		if (tag == TAG_NONE || (tag & ~TAG_CONTAINER) == t->tag ||
		    tag == (TAG_PORT | t->ifindex))
			return leave(skb, t->ifindex, t->mac, VERDICT_REPLY_TASK);
		return hang_up(skb, ip);
	}
	n = neighbour_of(dst, tag);
	if (!n && tag & TAG_PORT) /* the port is gone, or has other addresses since */
		return hang_up(skb, ip);
	if (!n)
		return conclude(VERDICT_REPLY_NOWHERE, TC_ACT_SHOT);
	if (tag != TAG_NONE && tag != n->tag)
		return hang_up(skb, ip);
	return leave(skb, n->ifindex, n->mac,
		     n->tag == TAG_NONE ? VERDICT_REPLY_BRIDGE : VERDICT_REPLY_PORT);
}

char _license[] SEC("license") = "GPL";
