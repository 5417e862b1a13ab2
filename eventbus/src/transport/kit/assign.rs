//! Who owns which partition: rendezvous hashing with equal shares.
//!
//! Every member computes the same answer from the same set of members, without a coordinator. A
//! partition goes to the member with the highest hash that still has room for its fair share, so
//! that a join or a leave moves few partitions and nobody idles.

/// Returns the index into `members` for each partition; empty if there are no members.
pub(crate) fn targets(members: &[u64], n_partitions: u32) -> Vec<usize> {
    if members.is_empty() {
        return Vec::new();
    }
    let share = (n_partitions as usize).div_ceil(members.len());
    let mut load = vec![0usize; members.len()];
    (0..n_partitions)
        .map(|partition| {
            let mut best = None;
            for (at, member) in members.iter().enumerate() {
                let weight = mix(member ^ mix(u64::from(partition) + 1));
                if load.get(at).is_some_and(|load| *load < share) && best.is_none_or(|(top, _)| weight > top)
                {
                    best = Some((weight, at));
                }
            }
            let chosen = best.map_or(0, |(_, at)| at);
            if let Some(load) = load.get_mut(chosen) {
                *load += 1;
            }
            chosen
        })
        .collect()
}

/// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_and_moves_are_few() {
        let members: Vec<u64> = (0..4).map(|at| mix(at + 100)).collect();
        let before = targets(&members, 16);
        for member in 0..4 {
            assert_eq!(before.iter().filter(|owner| **owner == member).count(), 4);
        }
        let after = targets(&members[..3], 16);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert!(moved <= 9, "{moved} of 16 moved, 4 had to");
    }

    #[test]
    fn nobody_owns_nothing_of_nothing() {
        assert!(targets(&[], 16).is_empty());
        assert_eq!(targets(&[7], 3), [0, 0, 0]);
    }
}
