//! Changes to JSON that leave it JSON: what bytes that are changed at random hardly ever do.

use serde_json::Value;

use crate::Bytes;

/// Values are not made larger than that.
const MOST: usize = 4000;

/// Changes a value as the input says, as long as there is input: each time a place, what to do, and with what.
pub fn edit(value: &mut Value, b: &mut Bytes<'_>) {
    while let Some(what) = b.next() {
        let count = size(value);
        let other = usize::from(b.u16()) % count;
        let copy = node(value, &mut { other }).cloned();
        let Some(place) = node(value, &mut (usize::from(b.u16()) % count)) else {
            return;
        };
        match (what % 9, place) {
            (0, place) => *place = Value::Null,
            (1, place) => *place = (b.u64() >> (b.u8() & 63)).into(),
            (2, place) => *place = (b.u64().cast_signed() >> (b.u8() & 63)).into(),
            (3, place) => *place = String::from_utf8_lossy(b.short()).into(),
            (4, Value::Array(all)) => drop(all.pop()),
            (5, Value::Array(all)) if count < MOST => all.extend(all.last().cloned()),
            (6, Value::Object(all)) => {
                if let Some(key) = all.keys().nth(usize::from(b.u8())).cloned() {
                    all.remove(&key);
                }
            }
            (7, place) if count < MOST => *place = copy.unwrap_or_default(),
            (_, Value::Bool(set)) => *set ^= true,
            // A little more or less.
            (_, place) => {
                if let Some(n) = place.as_i64() {
                    let by = i64::from(b.u8().cast_signed());
                    *place = n.wrapping_add(by << (b.u8() & 31)).into();
                }
            }
        }
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(size).sum(),
        Value::Object(all) => all.values().map(size).sum::<usize>(),
        _ => 0,
    }
}

/// The `n`-th value, from the top down.
fn node<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(all) => all.iter_mut().find_map(|v| node(v, n)),
        Value::Object(all) => all.values_mut().find_map(|v| node(v, n)),
        _ => None,
    }
}
