//! Percent-encoding of values and names, for bindings whose headers are text or have no order.

fn put_coded(byte: u8, out: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push('%');
    for digit in [byte >> 4, byte & 15] {
        out.push(char::from(DIGITS.get(usize::from(digit)).copied().unwrap_or(b'0')));
    }
}

/// Percent-encodes a value: what is no printable ASCII, and the space, `"` and `%`.
#[cfg(feature = "nats")]
pub(crate) fn value(value: &[u8]) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value {
        match byte {
            b'"' | b'%' => put_coded(*byte, &mut out),
            0x21..=0x7e => out.push(char::from(*byte)),
            _ => put_coded(*byte, &mut out),
        }
    }
    out
}

/// Percent-encodes a name, so that it may stand as a header and in the order.
pub(crate) fn name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'%' | b',' | b':' | b'"' => put_coded(byte, &mut out),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => put_coded(byte, &mut out),
        }
    }
    out
}

/// Reads what is percent-encoded; a `%` that begins no code stands for itself.
pub(crate) fn decoded(text: &str) -> Vec<u8> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    out
}
