//! Layered drawing of a DAG after Sugiyama, Tagawa & Toda (1981): layers by longest path, order within a layer by
//! barycentres, places by least squares under the minimum distances (pool adjacent violators).

/// Where a node is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placed {
    /// Layer, from 0 at the sources.
    pub layer: usize,
    /// Place across the layer: the node's centre.
    pub at: f64,
}

/// A finished layout.
#[derive(Clone, Debug)]
pub struct Layout {
    /// One place for each node.
    pub nodes: Vec<Placed>,
    /// For each edge its places from source to target; more than two where it passes through layers in between.
    pub edges: Vec<Vec<Placed>>,
    /// Number of layers.
    pub layers: usize,
    /// Extent across the layers, from 0.
    pub extent: f64,
}

struct Vertex {
    layer: usize,
    size: f64,
    before: Vec<usize>,
    after: Vec<usize>,
}

/// Lays out a DAG. `sizes` are the nodes' extents across the layers, `gap` is left between neighbours. Edges of a
/// cycle, which a checked plan does not have, are drawn but do not count for the layers.
pub fn layered(sizes: &[f64], edges: &[(usize, usize)], gap: f64) -> Layout {
    let layer = longest_paths(sizes.len(), edges);
    let mut vertices: Vec<Vertex> = sizes
        .iter()
        .zip(&layer)
        .map(|(&size, &layer)| Vertex { layer, size, before: Vec::new(), after: Vec::new() })
        .collect();
    // An edge across several layers passes through a thin stand-in in each, so that it gets a lane of its own.
    let mut chains = Vec::with_capacity(edges.len());
    for &(from, to) in edges {
        let mut chain = vec![from];
        for between in layer[from] + 1..layer[to] {
            vertices.push(Vertex { layer: between, size: gap / 4.0, before: Vec::new(), after: Vec::new() });
            chain.push(vertices.len() - 1);
        }
        chain.push(to);
        for pair in chain.windows(2) {
            vertices[pair[0]].after.push(pair[1]);
            vertices[pair[1]].before.push(pair[0]);
        }
        chains.push(chain);
    }
    let layers = layer.iter().max().map_or(0, |m| m + 1);
    let mut rows: Vec<Vec<usize>> = vec![Vec::new(); layers];
    for (i, vertex) in vertices.iter().enumerate() {
        rows[vertex.layer].push(i);
    }
    order(&vertices, &mut rows);
    let at = place(&vertices, &rows, gap);
    let low = vertices.iter().zip(&at).map(|(v, a)| a - v.size / 2.0).fold(f64::INFINITY, f64::min);
    let high = vertices.iter().zip(&at).map(|(v, a)| a + v.size / 2.0).fold(f64::NEG_INFINITY, f64::max);
    let placed = |i: usize| Placed { layer: vertices[i].layer, at: at[i] - low };
    Layout {
        nodes: (0..sizes.len()).map(placed).collect(),
        edges: chains.into_iter().map(|chain| chain.into_iter().map(placed).collect()).collect(),
        layers,
        extent: (high - low).max(0.0),
    }
}

/// Length of the longest path that ends in each node; cut at the number of nodes, so that cycles end.
fn longest_paths(nodes: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut layer = vec![0; nodes];
    for _ in 0..nodes {
        let mut changed = false;
        for &(from, to) in edges {
            if layer[to] < layer[from] + 1 && layer[from] + 1 < nodes {
                layer[to] = layer[from] + 1;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    layer
}

fn crossings(vertices: &[Vertex], rows: &[Vec<usize>]) -> usize {
    let mut rank = vec![0; vertices.len()];
    for row in rows {
        row.iter().enumerate().for_each(|(r, &v)| rank[v] = r);
    }
    let mut count = 0;
    for row in rows {
        let ends: Vec<(usize, usize)> = row
            .iter()
            .flat_map(|&v| vertices[v].after.iter().map(|&w| (rank[v], rank[w])).collect::<Vec<_>>())
            .collect();
        for (i, a) in ends.iter().enumerate() {
            count += ends[i + 1..].iter().filter(|b| (a.0 < b.0 && a.1 > b.1) || (a.0 > b.0 && a.1 < b.1)).count();
        }
    }
    count
}

/// Sweeps down and up, sorting each layer by the mean rank of its neighbours; the best order seen stays.
fn order(vertices: &[Vertex], rows: &mut [Vec<usize>]) {
    let mut best = (crossings(vertices, rows), rows.to_vec());
    let mut rank = vec![0.0; vertices.len()];
    for sweep in 0..12 {
        for row in rows.iter() {
            row.iter().enumerate().for_each(|(r, &v)| rank[v] = r as f64);
        }
        let down = sweep % 2 == 0;
        let indices: Vec<usize> = if down { (0..rows.len()).collect() } else { (0..rows.len()).rev().collect() };
        for i in indices {
            let key = |v: usize| {
                let near = if down { &vertices[v].before } else { &vertices[v].after };
                if near.is_empty() { rank[v] } else { near.iter().map(|&n| rank[n]).sum::<f64>() / near.len() as f64 }
            };
            let mut keyed: Vec<(f64, usize)> = rows[i].iter().map(|&v| (key(v), v)).collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            rows[i] = keyed.into_iter().map(|(_, v)| v).collect();
            rows[i].iter().enumerate().for_each(|(r, &v)| rank[v] = r as f64);
        }
        let now = crossings(vertices, rows);
        if now < best.0 {
            best = (now, rows.to_vec());
        }
    }
    rows.clone_from_slice(&best.1);
}

/// Moves each layer towards the mean of its neighbours, keeping order and distances.
fn place(vertices: &[Vertex], rows: &[Vec<usize>], gap: f64) -> Vec<f64> {
    let mut at = vec![0.0; vertices.len()];
    let offsets: Vec<Vec<f64>> = rows
        .iter()
        .map(|row| {
            let mut offset = 0.0;
            row.iter()
                .enumerate()
                .map(|(r, &v)| {
                    if r > 0 {
                        offset += (vertices[row[r - 1]].size + vertices[v].size) / 2.0 + gap;
                    }
                    offset
                })
                .collect()
        })
        .collect();
    for (row, offset) in rows.iter().zip(&offsets) {
        let middle = offset.last().copied().unwrap_or(0.0) / 2.0;
        row.iter().zip(offset).for_each(|(&v, o)| at[v] = o - middle);
    }
    for sweep in 0..16 {
        let indices: Vec<usize> =
            if sweep % 2 == 0 { (0..rows.len()).collect() } else { (0..rows.len()).rev().collect() };
        for i in indices {
            let wanted: Vec<f64> = rows[i]
                .iter()
                .zip(&offsets[i])
                .map(|(&v, o)| {
                    let near: Vec<usize> = vertices[v].before.iter().chain(&vertices[v].after).copied().collect();
                    let mean = near.iter().map(|&n| at[n]).sum::<f64>() / near.len().max(1) as f64;
                    if near.is_empty() { at[v] - o } else { mean - o }
                })
                .collect();
            let fitted = isotonic(&wanted);
            rows[i].iter().zip(&offsets[i]).zip(fitted).for_each(|((&v, o), f)| at[v] = f + o);
        }
    }
    at
}

/// The non-decreasing sequence nearest to `wanted` in least squares.
fn isotonic(wanted: &[f64]) -> Vec<f64> {
    let mut blocks: Vec<(f64, usize)> = Vec::new();
    for &w in wanted {
        blocks.push((w, 1));
        while let [.., (a, n), (b, m)] = blocks[..] {
            if a <= b {
                break;
            }
            blocks.truncate(blocks.len() - 2);
            blocks.push(((a * n as f64 + b * m as f64) / (n + m) as f64, n + m));
        }
    }
    blocks.into_iter().flat_map(|(mean, n)| std::iter::repeat_n(mean, n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn isotonic_pools_violators() {
        assert_eq!(isotonic(&[1.0, 3.0, 2.0, 4.0]), [1.0, 2.5, 2.5, 4.0]);
        assert_eq!(isotonic(&[3.0, 2.0, 1.0]), [2.0, 2.0, 2.0]);
    }

    #[test]
    fn layers_follow_edges_and_nodes_do_not_overlap() {
        let edges = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (3, 4)];
        let layout = layered(&[40.0; 5], &edges, 20.0);
        assert_eq!(layout.nodes.iter().map(|n| n.layer).collect::<Vec<_>>(), [0, 1, 1, 2, 3]);
        assert!((layout.nodes[1].at - layout.nodes[2].at).abs() >= 60.0 - 1e-9);
        assert_eq!(layout.edges[4].len(), 3, "0 to 3 passes through a lane in layer 1");
        let lane = layout.edges[4][1].at;
        assert!(layout.nodes[1..3].iter().all(|n| (n.at - lane).abs() >= 40.0), "the lane avoids the nodes");
    }

    #[test]
    fn crossings_are_removed() {
        let layout = layered(&[10.0; 4], &[(0, 3), (1, 2)], 5.0);
        let order = |a: usize, b: usize| layout.nodes[a].at < layout.nodes[b].at;
        assert_eq!(order(0, 1), order(3, 2));
    }

    #[test]
    fn a_cycle_ends() {
        assert_eq!(layered(&[1.0; 2], &[(0, 1), (1, 0)], 1.0).nodes.len(), 2);
        assert_eq!(layered(&[], &[], 1.0).layers, 0);
    }
}
