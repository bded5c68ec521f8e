//! How LoRA's matrices start.

use candle_core::{DType, Device, Tensor};

use crate::bail;
use crate::error::Result;
use crate::ops::Weight;
use crate::random::{self, Stream};
use crate::settings::LoraInit;

/// `A` `[rank, d_in]` and `B` `[d_out, rank]` for a weight `[d_out, d_in]` of this name; `scale` is what their product will be multiplied with.
pub fn update(
    how: LoraInit,
    weight: &Weight,
    name: &str,
    rank: usize,
    scale: f64,
    seed: u64,
) -> Result<(Tensor, Tensor)> {
    let [d_out, d_in] = weight.dims()?;
    let device = weight.device();
    let mut stream = random::stream(seed, &format!("initialize {name}.lora_A"), 0);
    let zero = || Tensor::zeros((d_out, rank), DType::F32, device);
    Ok(match how {
        // PEFT's `kaiming_uniform_(a=sqrt(5))`.
        LoraInit::Kaiming => {
            (random::uniform(&mut stream, &[rank, d_in], 1.0 / (d_in as f64).sqrt(), device)?, zero()?)
        }
        LoraInit::Gaussian => (random::normal(&mut stream, &[rank, d_in], 1.0 / rank as f64, device)?, zero()?),
        LoraInit::Orthogonal => orthogonal(&mut stream, name, rank, d_in, d_out, device)?,
        LoraInit::Pissa => principal(&mut stream, &weight.to_tensor()?, name, rank, scale)?,
    })
}

/// PEFT's `orthogonal`: with the even and odd rows of a random orthogonal matrix, `A = (G Q_odd)ᵀ / 10` and `B = H Q_even / 10` for normal `G` and `H`,
/// so that `B A = 0` although neither is zero.
fn orthogonal(
    stream: &mut Stream,
    name: &str,
    rank: usize,
    d_in: usize,
    d_out: usize,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    if !rank.is_multiple_of(2) {
        bail!("--init-lora-weights orthogonal: the rank of \"{name}\" is {rank}, expected an even number");
    }
    let square = orthonormal_columns(&random::normal(stream, &[rank, rank], 1.0, device)?)?; // [rank, rank]
    let pick = |first: u32| -> Result<Tensor> {
        let rows: Vec<u32> = (first..rank as u32).step_by(2).collect();
        Ok(square.index_select(&Tensor::from_slice(&rows, rows.len(), device)?, 0)?) // [rank / 2, rank]
    };
    let down = random::normal(stream, &[d_in, rank / 2], 0.1, device)?.matmul(&pick(1)?)?; // [d_in, rank]
    let up = random::normal(stream, &[d_out, rank / 2], 0.1, device)?.matmul(&pick(0)?)?; // [d_out, rank]
    Ok((down.t()?.contiguous()?, up))
}

/// PiSSA (Meng et al. 2024, eq. 2 and 3): `A = sqrt(S / s) Vᵀ`, `B = U sqrt(S / s)` of the `rank` greatest singular values of `W`.
fn principal(stream: &mut Stream, weight: &Tensor, name: &str, rank: usize, scale: f64) -> Result<(Tensor, Tensor)> {
    let (d_out, d_in) = weight.dims2()?;
    if rank > d_out.min(d_in) {
        bail!(
            "--init-lora-weights pissa: the rank of \"{name}\" is {rank}, more than its weight [{d_out}, {d_in}] has; lower --lora-r"
        );
    }
    let weight = weight.detach();
    let (left, values) = left_singular(stream, &weight, rank)?;
    let roots: Vec<f32> = values.iter().map(|value| (value / scale).sqrt() as f32).collect();
    let inverse_roots: Vec<f32> = values.iter().map(|value| 1.0 / (value * scale).sqrt().max(1e-20) as f32).collect();
    let row = |numbers: Vec<f32>| Tensor::from_vec(numbers, (1, rank), weight.device());
    let up = left.broadcast_mul(&row(roots)?)?; // [d_out, rank]
    // Vᵀ = S⁻¹ Uᵀ W.
    let down = left.broadcast_mul(&row(inverse_roots)?)?.t()?.matmul(&weight)?; // [rank, d_in]
    Ok((down, up))
}

/// Steps of the subspace iteration, and directions that it follows besides those asked for.
const ITERATIONS: usize = 16;
const OVERSAMPLING: usize = 8;

/// The first left singular vectors `[d_out, rank]` and values of a matrix, by subspace iteration from a random start (Halko et al. 2011,
/// algorithm 4.4).
fn left_singular(stream: &mut Stream, weight: &Tensor, rank: usize) -> Result<(Tensor, Vec<f64>)> {
    let (d_out, d_in) = weight.dims2()?;
    let width = (rank + OVERSAMPLING).min(d_out).min(d_in);
    let start = random::normal(stream, &[d_in, width], 1.0, weight.device())?;
    let mut basis = orthonormal_columns(&weight.matmul(&start)?)?; // [d_out, width]
    for _ in 0..ITERATIONS {
        let other = orthonormal_columns(&weight.t()?.matmul(&basis)?)?; // [d_in, width]
        basis = orthonormal_columns(&weight.matmul(&other)?)?;
    }
    let projected = basis.t()?.matmul(weight)?; // [width, d_in]
    let gram: Vec<Vec<f32>> = projected.matmul(&projected.t()?.contiguous()?)?.to_vec2()?;
    let (values, vectors) =
        symmetric_eigen(gram.iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect());
    let columns: Vec<f32> = (0..width)
        .flat_map(|row| (0..rank).map(move |column| (row, column)))
        .map(|(row, column)| vectors[row][column] as f32)
        .collect();
    let rotation = Tensor::from_vec(columns, (width, rank), weight.device())?;
    Ok((basis.matmul(&rotation)?, values[..rank].iter().map(|value| value.max(0.0).sqrt()).collect()))
}

/// The columns of `x` `[n, k]` made orthonormal one after the other (Gram-Schmidt, twice, which is enough).
fn orthonormal_columns(x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let mut basis: Vec<Vec<f64>> =
        (x.t()?.to_vec2::<f32>()?.into_iter()).map(|column| column.into_iter().map(f64::from).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for index in 0..columns {
        let (before, rest) = basis.split_at_mut(index);
        let column = &mut rest[0];
        for _ in 0..2 {
            for other in before.iter() {
                let shared = dot(column, other);
                column.iter_mut().zip(other).for_each(|(x, other)| *x -= shared * other);
            }
        }
        let norm = dot(column, column).sqrt().max(1e-300);
        column.iter_mut().for_each(|x| *x /= norm);
    }
    let values: Vec<f32> = (0..rows).flat_map(|row| basis.iter().map(move |column| column[row] as f32)).collect();
    Ok(Tensor::from_vec(values, (rows, columns), x.device())?)
}

/// Eigenvalues of a symmetric matrix from the greatest down, with their vectors as columns (Jacobi's method).
fn symmetric_eigen(mut matrix: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = matrix.len();
    let mut vectors: Vec<Vec<f64>> =
        (0..n).map(|row| (0..n).map(|column| f64::from(row == column)).collect()).collect();
    for _ in 0..60 {
        let off_diagonal: f64 =
            (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))).map(|(p, q)| matrix[p][q].powi(2)).sum();
        let diagonal: f64 = (0..n).map(|p| matrix[p][p].powi(2)).sum();
        if off_diagonal <= 1e-28 * diagonal {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut matrix, &mut vectors, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| matrix[b][b].total_cmp(&matrix[a][a]));
    let values = order.iter().map(|&index| matrix[index][index]).collect();
    let sorted = vectors.iter().map(|row| order.iter().map(|&index| row[index]).collect()).collect();
    (values, sorted)
}

/// The rotation of rows and columns `p` and `q` that makes their common element 0.
fn rotate(matrix: &mut [Vec<f64>], vectors: &mut [Vec<f64>], p: usize, q: usize) {
    if matrix[p][q] == 0.0 {
        return;
    }
    let theta = (matrix[q][q] - matrix[p][p]) / (2.0 * matrix[p][q]);
    let tangent = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let tangent = if theta == 0.0 { 1.0 } else { tangent };
    let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
    let sine = tangent * cosine;
    let turn = |a: f64, b: f64| (cosine * a - sine * b, sine * a + cosine * b);
    for row in matrix.iter_mut().chain(vectors.iter_mut()) {
        (row[p], row[q]) = turn(row[p], row[q]);
    }
    let (first, second) = matrix.split_at_mut(q);
    for (a, b) in first[p].iter_mut().zip(second[0].iter_mut()) {
        (*a, *b) = turn(*a, *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(shape: &[usize], seed: u64) -> Tensor {
        random::normal(&mut random::stream(seed, "test", 0), shape, 1.0, &Device::Cpu).unwrap()
    }

    fn largest(x: &Tensor) -> f32 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn orthogonal_matrices_are_away_from_zero_and_their_product_is_zero() -> Result<()> {
        let (down, up) = update(LoraInit::Orthogonal, &Weight::new(&normal(&[20, 30], 1), None), "w", 4, 2.0, 3)?;
        assert_eq!((down.dims(), up.dims()), (&[4, 30][..], &[20, 4][..]));
        assert!(largest(&down) > 0.05 && largest(&up) > 0.05 && largest(&up.matmul(&down)?) < 1e-6);
        assert!(update(LoraInit::Orthogonal, &Weight::new(&normal(&[20, 30], 1), None), "w", 3, 2.0, 3).is_err());
        Ok(())
    }

    #[test]
    fn principal_components_of_a_matrix_of_low_rank_are_all_of_it() -> Result<()> {
        let weight = normal(&[25, 3], 1).matmul(&normal(&[3, 40], 2))?;
        let (down, up) = update(LoraInit::Pissa, &Weight::new(&weight, None), "w", 3, 0.5, 3)?;
        let difference = (up.matmul(&down)?.affine(0.5, 0.0)? - &weight)?;
        assert!(largest(&difference) < 1e-4 * largest(&weight));
        assert!(update(LoraInit::Pissa, &Weight::new(&weight, None), "w", 26, 0.5, 3).is_err());
        Ok(())
    }
}
