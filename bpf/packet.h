/*
 * The headers of a packet: what they say about its sender, and how a TCP port in them is changed.
 * Nothing here reads or writes a map.
 */
#ifndef PACKET_H
#define PACKET_H

#include <stddef.h>
#include <linux/ip.h>
#include <linux/in.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>

#include "metad.h"

#define META_ADDR bpf_htonl(0xa9feaa02) /* 169.254.170.2: ECS task metadata endpoint */
#define META_DPORT bpf_htons(80)
/* A closed TCP port of the server's namespace, whose TCP stack resets what is sent there. */
#define REFUSE_DPORT bpf_htons(1)

/* include/net/ip.h */
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

/* RFC 9293, 3.1: the byte with the flags, and some of them. */
#define TCP_FLAGS_OFFSET 13
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* What the headers of a packet say about its sender. */
struct sender {
	__be32 addr;
	__u8 mac[ETH_ALEN];
	__be16 sport; /* of TCP; 0: a fragment */
	__u8 syn;
	__u8 fin;
};

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	/* Bytes, not words: a field of a map's value may have any alignment, and -mcpu=v2 has no
	 * unaligned loads. */
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) |
		 (a[5] ^ b[5]));
}

/* parse reads the headers of a frame that passed the filter. It returns VERDICT_OPEN and the sender
 * if the frame is for the server, otherwise the verdict. */
static __always_inline enum verdict parse(struct __sk_buff *skb, struct sender *s)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct {
		__be16 source, dest;
		__u8 rest[TCP_FLAGS_OFFSET + 1 - 4];
	} tcp;

	if ((void *)(ip + 1) > data_end || ip->version != 4 || ip->ihl < 5)
		return VERDICT_MALFORMED;
	s->addr = ip->saddr;
	__builtin_memcpy(s->mac, eth->h_source, ETH_ALEN);
	s->sport = 0;
	s->syn = s->fin = 0;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return VERDICT_OPEN;
	if (bpf_skb_load_bytes(skb, sizeof(*eth) + ip->ihl * 4, &tcp, sizeof(tcp)))
		return VERDICT_MALFORMED;
	if (tcp.dest != META_DPORT)
		return VERDICT_OTHER_DPORT;
	s->sport = tcp.source;
	s->syn = (tcp.rest[TCP_FLAGS_OFFSET - 4] & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	s->fin = tcp.rest[TCP_FLAGS_OFFSET - 4] & TCP_FIN;
	return VERDICT_OPEN;
}

/* set_tcp_port writes sport or dport, which is at the offset in the TCP header. The header is tcp
 * bytes into the frame. */
static __always_inline int set_tcp_port(struct __sk_buff *skb, int tcp, int offset, __be16 from,
					__be16 to)
{
	if (bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), from, to, sizeof(to)))
		return -1;
	return bpf_skb_store_bytes(skb, tcp + offset, &to, sizeof(to), 0);
}

#endif
