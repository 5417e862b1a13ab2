//! Which partition a key belongs to: Kafka's murmur2, equal to the Java client's.

use std::fmt;

use crate::envelope::Envelope;
use crate::name::Key;

/// The number of a partition, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PartitionId(pub u32);

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns the partition of a key among `n_partitions`, as Kafka's default partitioner does for Java
/// (`Utils.toPositive(Utils.murmur2(key)) % numPartitions`).
pub fn of_key(key: &Key, n_partitions: u32) -> PartitionId {
    of_bytes(key.as_bytes(), n_partitions)
}

/// Returns the partition of an event: by its key, or by its id where it has none.
pub fn of_envelope(envelope: &Envelope, n_partitions: u32) -> PartitionId {
    match envelope.key() {
        Some(key) => of_key(key, n_partitions),
        None => match envelope.id().as_uuid() {
            Some(uuid) => of_bytes(uuid.as_bytes(), n_partitions),
            None => of_bytes(envelope.id().to_string().as_bytes(), n_partitions),
        },
    }
}

fn of_bytes(bytes: &[u8], n_partitions: u32) -> PartitionId {
    PartitionId((murmur2(bytes) & 0x7fff_ffff) % n_partitions.max(1))
}

/// MurmurHash2, 32 bits, with the seed of `org.apache.kafka.common.utils.Utils`.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mut hash = SEED ^ (data.len() as u32);
    let (words, tail) = data.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    for (at, byte) in tail.iter().enumerate() {
        hash ^= u32::from(*byte) << (8 * at);
    }
    if !tail.is_empty() {
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn murmur2_equals_the_java_client() {
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()) as i32, hash, "{key}");
        }
    }

    #[test]
    fn keyless_events_spread() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200 {
            seen.insert(of_envelope(&Envelope::new("t", "/s"), 16));
        }
        assert!(seen.len() > 8);
    }
}
